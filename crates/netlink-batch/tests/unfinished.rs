//! Dumps that are not read to their end, and the asynchronous socket.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::net::Ipv4Addr;
use std::time::Duration;

use common::{ENODEV, LOOPBACK, NO_DEVICE, add_address, get_link};
use netlink_batch::protocols::NETLINK_ROUTE;
use netlink_batch::{AsyncSocket, BATCH_MESSAGES, Socket};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::LinkMessage;

/// Enough that the kernel is still dumping when the first reply is read.
const ADDRESSES: u32 = 2000;

fn all_addresses() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetAddress(AddressMessage::default())
}

/// A network namespace with many addresses.
fn isolate() -> Socket {
    lab::netns::isolate().unwrap();
    let mut socket = Socket::open(NETLINK_ROUTE).unwrap();
    let add = (0..ADDRESSES).map(|number| add_address(Ipv4Addr::from(0x0a60_0000 + number)));
    assert!(socket.batch(add).unwrap().iter().all(Result::is_ok));
    socket
}

fn on_one_thread<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn an_unfinished_dump_does_not_block_the_next() {
    let mut socket = isolate();
    for read in [0, 1, 100] {
        let stream = socket.stream(&all_addresses()).unwrap();
        let left: Vec<RouteNetlinkMessage> = stream.take(read).map(Result::unwrap).collect();
        assert_eq!(left.len(), read);
    }
    let stream = socket.stream(&all_addresses()).unwrap();
    let all: Vec<RouteNetlinkMessage> = stream.map(Result::unwrap).collect();
    assert!(all.len() >= ADDRESSES as usize);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn an_unfinished_async_dump_does_not_block_the_next() {
    drop(isolate());
    on_one_thread(async {
        let mut socket = AsyncSocket::open(NETLINK_ROUTE).unwrap();
        for read in [0, 1, 100] {
            let mut stream = socket.stream(&all_addresses()).await.unwrap();
            for _ in 0..read {
                let _: RouteNetlinkMessage = stream.next().await.unwrap().unwrap();
            }
        }
        let mut count = 0;
        socket.dump(&all_addresses(), |_: RouteNetlinkMessage| count += 1).await.unwrap();
        assert!(count >= ADDRESSES, "{count}");
        socket.request(&get_link(LOOPBACK).into(), |_: RouteNetlinkMessage| ()).await.unwrap();
    });
}

#[test]
fn async_requests_have_the_same_replies() {
    on_one_thread(async {
        let mut socket = AsyncSocket::open(NETLINK_ROUTE).unwrap();
        let mut seen = 0;
        socket.request(&get_link(LOOPBACK).into(), |_: RouteNetlinkMessage| seen += 1).await.unwrap();
        assert_eq!(seen, 1);
        let error = socket.request(&get_link(NO_DEVICE).into(), |_: RouteNetlinkMessage| ()).await.unwrap_err();
        assert_eq!(error.refusal().unwrap().errno, ENODEV);
        for length in [0, 1, BATCH_MESSAGES, BATCH_MESSAGES + 1, 1000] {
            let results = socket.batch((0..length).map(|_| get_link(NO_DEVICE).into())).await.unwrap();
            assert_eq!(results.iter().filter(|result| result.is_err()).count(), length);
        }
        let mut links = 0;
        let all = RouteNetlinkMessage::GetLink(LinkMessage::default());
        socket.dump(&all, |_: RouteNetlinkMessage| links += 1).await.unwrap();
        assert!(links > 0);
        let sent = socket.sent();
        assert_eq!((sent.messages, sent.datagrams), (1 + 1 + 1 + 128 + 129 + 1000 + 1, 2 + 1 + 1 + 2 + 8 + 1));
        assert_eq!(sent.bytes, sent.messages * 32);
    });
}

#[test]
fn other_tasks_run_between_requests() {
    on_one_thread(async {
        let turns = std::rc::Rc::new(std::cell::Cell::new(0));
        let counted = turns.clone();
        let local = tokio::task::LocalSet::new();
        local.spawn_local(async move {
            loop {
                counted.set(counted.get() + 1);
                tokio::task::yield_now().await;
            }
        });
        local
            .run_until(async {
                let mut socket = AsyncSocket::open(NETLINK_ROUTE).unwrap();
                for _ in 0..1000 {
                    socket.request(&get_link(LOOPBACK).into(), |_: RouteNetlinkMessage| ()).await.unwrap();
                }
            })
            .await;
        assert!(turns.get() >= 5, "{} turns", turns.get());
    });
}

/// Polls a future once, so that it goes on until it has used what is left of the task's budget, and drops it.
async fn poll_with_budget<T>(left: u32, future: impl Future<Output = T>) {
    // From here on the budget is whole.
    tokio::task::yield_now().await;
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|context| {
        for _ in left..TASK_BUDGET {
            let mut consume = std::pin::pin!(tokio::task::coop::consume_budget());
            let _ = consume.as_mut().poll(context);
        }
        let _ = future.as_mut().poll(context);
        std::task::Poll::Ready(())
    })
    .await;
}

/// How often a task of tokio can go on before it yields.
const TASK_BUDGET: u32 = 128;

#[test]
fn replies_to_a_future_dropped_at_any_await_are_not_kept() {
    on_one_thread(async {
        let mut socket = AsyncSocket::open(NETLINK_ROUTE).unwrap();
        // A batch of five datagrams awaits before each `send` and each `recv`.
        for left in 0..20 {
            // As many refusals as two batches have overrun the receive buffer.
            for _ in 0..4 {
                let batch = socket.batch((0..5 * BATCH_MESSAGES).map(|_| get_link(NO_DEVICE).into()));
                poll_with_budget(left, batch).await;
            }
            tokio::task::yield_now().await;
            let results = socket.batch((0..BATCH_MESSAGES).map(|_| get_link(NO_DEVICE).into())).await.unwrap();
            assert!(results.iter().all(Result::is_err), "{left} awaits");
            poll_with_budget(left, socket.request(&get_link(NO_DEVICE).into(), |_: RouteNetlinkMessage| ())).await;
            let mut seen = 0;
            socket.request(&get_link(LOOPBACK).into(), |_: RouteNetlinkMessage| seen += 1).await.unwrap();
            assert_eq!(seen, 1, "{left} awaits");
            let all = RouteNetlinkMessage::GetLink(LinkMessage::default());
            poll_with_budget(left, socket.dump(&all, |_: RouteNetlinkMessage| ())).await;
        }
    });
}

#[test]
fn a_dropped_future_leaves_the_socket_usable() {
    on_one_thread(async {
        let mut socket = AsyncSocket::open(NETLINK_ROUTE).unwrap();
        for _ in 0..100 {
            let request = get_link(LOOPBACK).into();
            let ask = socket.request(&request, |_: RouteNetlinkMessage| ());
            // Polled once at most.
            let _ = tokio::time::timeout(Duration::ZERO, ask).await;
            let batch = socket.batch((0..300).map(|_| get_link(NO_DEVICE).into()));
            let _ = tokio::time::timeout(Duration::ZERO, batch).await;
            let results = socket.batch([get_link(LOOPBACK).into(), get_link(NO_DEVICE).into()]).await.unwrap();
            assert_eq!(results.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false]);
        }
    });
}
