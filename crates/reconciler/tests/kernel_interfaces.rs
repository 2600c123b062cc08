//! The watch over the node's interfaces, on a real kernel.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::Write as _;
use std::process::{Command, Stdio};

use lab::netns::isolate;
use reconciler::binding::VipBinding;
use reconciler::linux::interface_watch::{InterfaceChanges, InterfaceWatch};

fn ip(batch: &str) {
    let mut ip = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    ip.stdin.take().unwrap().write_all(batch.as_bytes()).unwrap();
    assert!(ip.wait().unwrap().success());
}

/// So many VIPs that the kernel drops most of what it has to tell of them.
fn many(verb: &str) -> String {
    let lines = (0..4000).map(|it| format!("address {verb} 10.96.{}.{}/32 dev kube-ipvs0\n", it / 250, it % 250));
    lines.collect::<Vec<_>>().concat()
}

#[test]
#[ignore = "needs a kernel with dummy devices: cargo xtask test"]
fn a_flood_of_notifications_does_not_hide_device_loss() {
    isolate().unwrap();
    let mut watch = InterfaceWatch::open(&VipBinding::Addresses).unwrap();
    ip("link add kube-ipvs0 type dummy\n");
    assert_eq!(watch.wait().unwrap(), InterfaceChanges::default());
    ip(&many("add"));
    let mut flood = watch.wait().unwrap();
    while !flood.addresses {
        flood = watch.wait().unwrap();
    }
    assert_eq!(
        flood,
        InterfaceChanges { addresses: true, ..InterfaceChanges::default() },
        "nothing but the watch's own queue was lost"
    );

    ip(&format!("{}link del kube-ipvs0\nlink add kube-ipvs0 type dummy\n", many("del")));
    let mut flood = watch.wait().unwrap();
    while !flood.device_lost {
        flood = watch.wait().unwrap();
    }
    ip("address add 10.0.0.1/8 dev lo\n");
    while !watch.wait().unwrap().addresses {}
}
