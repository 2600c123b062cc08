//! Network namespaces inside the lab.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::process::Command;

use lab::netns::{self, End, Namespace};

/// The services in the calling thread's network namespace, as the kernel lists them.
fn services() -> String {
    let listing = fs::read_to_string("/proc/thread-self/net/ip_vs").expect("the kernel has IPVS");
    listing.lines().skip(3).collect()
}

fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().expect("a program")).args(words).output().expect(command);
    assert!(output.status.success(), "{command}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_fresh_namespace_holds_only_a_loopback_device_that_is_up() {
    netns::isolate().unwrap();
    let links = run("ip -oneline link show");
    assert_eq!(links.lines().count(), 1, "{links}");
    assert!(links.contains("lo: <LOOPBACK,UP"), "{links}");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    TcpListener::bind("[::1]:0").unwrap();
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn ipvs_is_per_namespace() {
    netns::isolate().unwrap();
    assert_eq!(services(), "");
    run("ipvsadm -A -t 10.96.0.1:80 -s rr");
    assert!(services().contains("0A600001:0050 rr"), "{}", services());

    let other = Namespace::new().unwrap();
    assert_eq!(other.run(services).unwrap(), "");
    other.exec("ipvsadm -A -u 10.96.0.2:53 -s wrr").unwrap();
    assert!(other.run(services).unwrap().contains("0A600002:0035 wrr"));
    assert!(!services().contains("0A600002"), "{}", services());
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn connected_namespaces_reach_each_other_in_both_families() {
    let client = Namespace::new().unwrap();
    let server = Namespace::new().unwrap();
    Namespace::connect(
        End { namespace: &client, device: "eth0", addresses: &["10.1.0.1/24", "fd00:1::1/64"] },
        End { namespace: &server, device: "eth0", addresses: &["10.1.0.2/24", "fd00:1::2/64"] },
    )
    .unwrap();
    for address in ["10.1.0.2:80", "[fd00:1::2]:80"] {
        let listener = server.run(|| TcpListener::bind(address)).unwrap().unwrap();
        let stream = client.run(|| TcpStream::connect(address)).unwrap().unwrap();
        let (accepted, from) = listener.accept().unwrap();
        assert_eq!(stream.local_addr().unwrap(), from);
        drop(accepted);
    }
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_named_namespace_is_one_for_ip_as_well() {
    let name = format!("lab-test-{}", std::process::id());
    let node = Namespace::named(&name).unwrap();
    run(&format!("ip netns exec {name} ipvsadm -A -t 10.96.0.3:80 -s rr"));
    assert!(node.run(services).unwrap().contains("0A600003:0050"));
    assert!(Namespace::named(&name).is_err());
    drop(node);
    assert!(!run("ip netns list").contains(&name));
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn a_program_that_fails_is_an_error_that_says_why() {
    let namespace = Namespace::new().unwrap();
    let error = namespace.exec("ip link set no-such-device up").unwrap_err().to_string();
    assert!(error.contains("ip link set no-such-device up") && error.contains("no-such-device"), "{error}");
}
