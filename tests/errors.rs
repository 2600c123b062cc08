//! The kernel says no, with every error it may have and to whatever it is asked: what it does not refuse is done, what it
//! refused is tried again, and once it refuses nothing any more everything is as if it never had.

#![cfg(feature = "fault-points")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::process::Command;

use common::{Agent, Filter, Manifests, addresses, eth0, has_tables, ipvs, ipvsadm, metric, service, slice};
use lab::http::Metrics;
use lab::netns::isolate;
use lab::objects::{load_balancer, manifest, with};
use serde_json::json;

/// What stays all along.
const KEPT: &str = "-a -t 10.96.0.1:80 -r 10.0.0.1:8080 -m -w 1";
const FOREIGN: &str = "-A -t 172.16.0.1:80 -s rr";

fn write(manifests: &Manifests, round: usize) {
    let kept = [service("kept", "10.96.0.1"), slice("kept-1", "kept", &["10.0.0.1"])];
    manifests.write("kept.json", &manifest(&kept));
    for number in 0..6 {
        let file = format!("s{number}.json");
        let (name, vip) = (format!("s{number}"), format!("10.96.1.{number}"));
        // Services come and go, and their endpoints change.
        if (number + round).is_multiple_of(3) {
            if manifests.contains(&file) {
                manifests.remove(&file);
            }
        } else {
            let endpoints: Vec<String> = (0..3).map(|it| format!("10.0.{number}.{}", it + round % 4)).collect();
            let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
            let balanced = json!({
                "spec": {
                    "type": "LoadBalancer",
                    "externalIPs": [format!("203.0.113.{number}")],
                    "loadBalancerSourceRanges": [format!("10.{round}.0.0/16")],
                },
                "status": load_balancer(&[format!("198.51.100.{number}")]),
            });
            let objects = [with(service(&name, &vip), balanced), slice(&format!("{name}-1"), &name, &endpoints)];
            manifests.write(&file, &manifest(&objects));
        }
    }
}

fn node() {
    isolate().unwrap();
    eth0();
    ipvsadm(FOREIGN);
}

/// How many operations and readings have failed, of an agent with fault points.
fn refused() -> f64 {
    Metrics::read().map_or(0.0, |metrics| {
        metrics.sum("kube_ipvs_operation_failures_total") + metrics.sum("kube_ipvs_kernel_read_failures_total")
    })
}

/// The agent goes through all rounds while `variable` has these faults, and then without.
fn survives(variable: &str, every: u64, errno: i32, flags: &[&str]) {
    node();
    let manifests = Manifests::new();
    let during = manifests.path().join(".faults");
    write(&manifests, 0);
    let directory = format!("--manifests={}", manifests.path().display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-ipvs"));
    command.args([&directory, "--hostname-override=node-a", "--ipvs-min-sync-period=0s", "--ipvs-sync-period=300ms"]);
    command.args(flags).env(variable, format!("{every}:{errno}:{}", during.display()));
    let mut agent = Agent::start_command(&mut command);
    agent.until("serve", |_| ipvs().iter().any(|line| line == KEPT));
    fs::write(&during, "").unwrap();
    for round in 1..6 {
        let before = refused();
        write(&manifests, round);
        agent.until("be refused something", |_| refused() > before);
        let held = ipvs();
        assert!(held.iter().any(|line| line == KEPT), "{held:#?}\n{}", agent.log());
        assert!(held.iter().any(|line| line == FOREIGN), "{held:#?}\n{}", agent.log());
    }
    println!("{variable} {errno}: {} operations and readings failed", refused());
    fs::remove_file(&during).unwrap();

    let right = std::thread::scope(|scope| {
        let fresh = scope.spawn(|| {
            node();
            let mut fresh = manifests.agent(&[&["--once"], flags].concat());
            assert!(fresh.ends().success(), "{}", fresh.log());
            (ipvs(), addresses(), Filter::read())
        });
        fresh.join().unwrap()
    });
    agent.until("be as if nothing had ever been refused", |_| {
        ipvs() == right.0 && addresses() == right.1 && right.2.is_again()
    });
    agent.until("have nothing that fails", |_| metric("kube_ipvs_failing") == Some(0.0));
    assert!(!agent.log().contains("panicked"), "{}", agent.log());
}

fn refused_operations_are_retried_and_hold_up_no_others(errno: i32) {
    survives("NETLINK_REFUSE", 4, errno, &[]);
}

fn refused_routes_are_retried(errno: i32) {
    survives("NETLINK_REFUSE", 4, errno, &["--vip-binding=route"]);
}

/// As after a socket is closed, and where the kernel has no memory for an answer.
fn sockets_that_fail_are_opened_again(errno: i32) {
    survives("NETLINK_FAIL", 7, errno, &[]);
}

/// A module with the name of a function, and in it a test for each of these errors, by name as in errno(3).
macro_rules! with_each_error {
    ($function:ident: $($name:ident $errno:literal),+) => {
        mod $function {
            $(
                #[test]
                #[ignore = "needs a kernel with IPVS: cargo xtask test"]
                fn $name() {
                    super::$function($errno);
                }
            )+
        }
    };
}

with_each_error!(refused_operations_are_retried_and_hold_up_no_others: eperm 1, enoent 2, eintr 4, enomem 12, ebusy 16, eexist 17,
    einval 22, emsgsize 90, eaddrnotavail 99, enobufs 105);
with_each_error!(refused_routes_are_retried: eperm 1, enoent 2, eintr 4, enomem 12, ebusy 16, eexist 17, einval 22, emsgsize 90,
    eaddrnotavail 99, enobufs 105);
with_each_error!(sockets_that_fail_are_opened_again: ebadf 9, enomem 12, enobufs 105, econnrefused 111);

/// What tells that something is ours goes last of all, also where not everything went.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_repeated_cleanup_removes_what_the_first_could_not() {
    node();
    let manifests = Manifests::new();
    write(&manifests, 0);
    assert!(manifests.agent(&["--once"]).ends().success());
    let during = manifests.path().join(".faults");
    fs::write(&during, "").unwrap();
    let cleanup = |faults: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kube-ipvs"));
        command.arg("cleanup").env("NETLINK_REFUSE", faults).output().unwrap()
    };
    let first = cleanup(&format!("3:12:{}", during.display()));
    assert!(!first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    assert!(ipvs().len() > 1 && has_tables(), "{:#?}", ipvs());
    fs::remove_file(&during).unwrap();
    let second = cleanup("");
    assert!(second.status.success(), "{}", String::from_utf8_lossy(&second.stderr));
    assert_eq!((ipvs(), has_tables()), (vec![FOREIGN.to_owned()], false));
}
