//! The claim on a network namespace, on a real kernel, in both ways that kernels have.

use std::os::fd::OwnedFd;
use std::process::Command;

use lab::netns::isolate;
use reconciler::linux::instance::{Claim, Method, TABLE, claim, claim_by, port};
use rustix::process::Uid;
use rustix::thread::set_thread_uid;

const METHODS: [Method; 2] = [Method::Table, Method::LogGroup];

fn ours(claim: Option<Claim>) -> OwnedFd {
    match claim {
        Some(Claim::Ours(socket)) => socket,
        other => unreachable!("{other:?}"),
    }
}

#[test]
#[ignore = "needs a kernel with nf_tables: cargo xtask test"]
fn one_socket_has_the_claim_until_it_is_closed() {
    for method in METHODS {
        isolate().unwrap();
        let first = ours(claim_by(method, None));
        let first_port = port(&first).unwrap();
        for _ in 0..2 {
            let second = claim_by(method, None).unwrap();
            assert!(matches!(second, Claim::Taken { port } if port == Some(first_port)), "{method:?}: {second:?}");
        }
        // The socket of the claim still proves it after an exec.
        let inherited = (first_port, first.try_clone().unwrap());
        assert_eq!(port(&ours(claim_by(method, Some(&inherited)))), Some(first_port));
        drop((first, inherited));
        ours(claim_by(method, None));
    }
}

#[test]
#[ignore = "needs a kernel with nf_tables: cargo xtask test"]
fn without_the_capability_a_claim_is_neither_made_nor_found() {
    for method in METHODS {
        isolate().unwrap();
        let by_stranger = std::thread::spawn(move || {
            // Of this thread alone, which loses its capabilities by that.
            set_thread_uid(Uid::from_raw(65_534)).unwrap();
            claim_by(method, None)
        });
        let by_stranger = by_stranger.join().unwrap();
        assert!(!matches!(by_stranger, Some(Claim::Ours(_) | Claim::Taken { .. })), "{method:?}: {by_stranger:?}");
        ours(claim_by(method, None));
    }
}

#[test]
#[ignore = "needs a kernel with nf_tables: cargo xtask test"]
fn claims_of_other_namespaces_and_tables_without_owner_count_for_nothing() {
    isolate().unwrap();
    let _elsewhere = ours(Some(claim(None)));
    isolate().unwrap();
    // As from a saved ruleset.
    let table = format!("add table ip {TABLE}; add chain ip {TABLE} c; add table inet {TABLE}");
    assert!(Command::new("nft").arg(table).status().unwrap().success());
    let _held = ours(Some(claim(None)));
    assert!(matches!(claim(None), Claim::Taken { .. }));
    // Others cannot take it away.
    assert!(Command::new("nft").arg("flush ruleset").status().unwrap().success());
    assert!(!Command::new("nft").args(["delete", "table", "ip", TABLE]).status().unwrap().success());
    assert!(matches!(claim(None), Claim::Taken { .. }));
}
