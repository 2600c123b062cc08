//! The asynchronous client, and the messages over a socket of another crate.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};

use common::{client, real, round_robin, tcp};
use ipvs_netlink::{
    AsyncClient, ErrorKind, Family, Message, Netmask, Persistence, Protocol, Table, Timeouts, VirtualServer,
    VirtualServerId,
};

fn on_one_thread<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// The processor time of the calling thread.
fn cpu_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
    let [user, system] = [usage.user_time(), usage.system_time()]
        .map(|time| Duration::new(time.tv_sec().try_into().unwrap(), u32::try_from(time.tv_usec()).unwrap() * 1000));
    user + system
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn other_tasks_run_every_few_milliseconds_during_lists_and_drains() {
    let mut client = client();
    let servers: Vec<_> = (0..4000_u32)
        .map(|number| {
            let address = std::net::SocketAddr::from((std::net::Ipv4Addr::from(0x0a60_0000 + number), 80));
            Message::AddVirtualServer(round_robin(VirtualServerId::address(Protocol::Tcp, address)))
        })
        .collect();
    assert!(client.apply(&servers).unwrap().iter().all(Result::is_ok));
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
                let mut client = AsyncClient::connect().await.unwrap();
                let (begin, before) = (cpu_time(), turns.get());
                assert_eq!(client.virtual_servers().await.unwrap().len(), servers.len());
                let listed = cpu_time().saturating_sub(begin);
                assert!(
                    (turns.get() - before) * 5 >= listed.as_millis(),
                    "{} turns in {listed:?}",
                    turns.get() - before
                );

                // A list that is cancelled after some datagrams; the next request discards the rest.
                let cancelled_since = std::time::Instant::now();
                let patience = Duration::from_millis(2);
                tokio::select! {
                    biased;
                    _ = client.virtual_servers() => panic!("a list of 45 datagrams ended before a timer"),
                    () = async {
                        while cancelled_since.elapsed() < patience {
                            tokio::task::yield_now().await;
                        }
                    } => {}
                }
                let (begin, before) = (cpu_time(), turns.get());
                assert!(client.info().await.is_ok());
                let drained = cpu_time().saturating_sub(begin);
                println!("listed in {listed:?}, drained in {drained:?} with {} turns", turns.get() - before);
                assert!(
                    (turns.get() - before) * 5 >= drained.as_millis(),
                    "{} turns in {drained:?}",
                    turns.get() - before
                );
            })
            .await;
    });
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_async_client_has_every_method() {
    let mut client = client();
    on_one_thread(async {
        let mut async_client = AsyncClient::connect().await.unwrap();
        let web = tcp("10.96.0.1:80");
        async_client.add_virtual_server(&round_robin(web)).await.unwrap();
        let error = async_client.add_virtual_server(&round_robin(web)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exists);
        async_client.add_real_server(&web, &real("10.1.0.7:80")).await.unwrap();
        async_client.set_timeouts(Timeouts { tcp: 901, ..Timeouts::default() }).await.unwrap();
        assert_eq!(async_client.timeouts().await.unwrap().tcp, 901);
        assert_eq!(async_client.virtual_servers().await.unwrap(), client.virtual_servers().unwrap());

        let wanted: Table = (1..=200)
            .map(|number| (round_robin(tcp(&format!("10.96.1.{number}:80"))), vec![real("10.1.0.7:80")]))
            .collect();
        let changes = async_client.table().await.unwrap().changes_to(&wanted);
        assert_eq!(changes.len(), 401);
        assert!(async_client.apply(&changes).await.unwrap().iter().all(Result::is_ok));
        assert_eq!(client.table().unwrap(), wanted);

        // A future that is dropped half-way leaves the client usable.
        for _ in 0..50 {
            let _ = tokio::time::timeout(Duration::ZERO, async_client.table()).await;
            assert_eq!(async_client.virtual_server(&tcp("10.96.1.9:80")).await.unwrap().server.id, tcp("10.96.1.9:80"));
        }
        assert_eq!(async_client.virtual_servers().await.unwrap().len(), 200);
        // One that goes before its turn is left out.
        let mut servers = async_client.servers().await.unwrap();
        let first = servers.next().await.unwrap().unwrap().virtual_server.server.id;
        let gone = (1..=200).map(|number| tcp(&format!("10.96.1.{number}:80"))).filter(|id| *id != first).take(50);
        let deletions: Vec<_> = gone.map(Message::DeleteVirtualServer).collect();
        assert!(client.apply(&deletions).unwrap().iter().all(Result::is_ok));
        let mut left = 0;
        while let Some(server) = servers.next().await {
            assert_eq!(server.unwrap().real_servers.len(), 1);
            left += 1;
        }
        assert_eq!(left, 149);

        // What the client does not send is refused here too.
        let netmask = Netmask::host(Family::Ipv6);
        let wrong = VirtualServer { persistence: Some(Persistence { timeout: 60, netmask }), ..round_robin(web) };
        let error = async_client.add_virtual_server(&wrong).await.unwrap_err();
        assert_eq!((error.kind(), error.refusal()), (ErrorKind::Invalid, None));
        let results = async_client
            .apply(&[Message::AddVirtualServer(wrong), Message::Timeouts(Timeouts::default())])
            .await
            .unwrap();
        assert!(results.iter().all(|result| result.as_ref().is_err_and(|error| error.refusal().is_none())));

        async_client.flush().await.unwrap();
        assert!(async_client.table().await.unwrap().is_empty());
    });
}

/// The messages speak for themselves: on the socket of `netlink-proto`, as `genetlink` and `rtnetlink` have it.
#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn messages_travel_over_netlink_proto() {
    use futures_util::StreamExt;
    use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
    use netlink_packet_generic::GenlMessage;
    use netlink_packet_generic::constants::GENL_ID_CTRL;
    use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
    use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
    use netlink_proto::sys::SocketAddr;
    use netlink_proto::sys::protocols::NETLINK_GENERIC;

    let mut client = client();
    client.add_virtual_server(&round_robin(tcp("10.96.0.1:80"))).unwrap();
    on_one_thread(async {
        let (connection, handle, _) = netlink_proto::new_connection::<GenlMessage<GenlCtrl>>(NETLINK_GENERIC).unwrap();
        tokio::spawn(connection);
        let name = GenlCtrlAttrs::FamilyName("IPVS".to_owned());
        let mut ask = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![name] });
        ask.set_resolved_family_id(GENL_ID_CTRL);
        let mut ask = NetlinkMessage::from(ask);
        ask.header.flags = NLM_F_REQUEST;
        let answer = handle.request(ask, SocketAddr::new(0, 0)).unwrap().next().await.unwrap();
        let NetlinkPayload::InnerMessage(answer) = answer.payload else { panic!("{answer:?}") };
        let family = answer.payload.nlas.iter().find_map(|attribute| match attribute {
            GenlCtrlAttrs::FamilyId(id) => Some(*id),
            _ => None,
        });

        let (connection, handle, _) = netlink_proto::new_connection::<GenlMessage<Message>>(NETLINK_GENERIC).unwrap();
        tokio::spawn(connection);
        let send = |message: Message, flags: u16| {
            let mut message = GenlMessage::from_payload(message);
            message.set_resolved_family_id(family.unwrap());
            let mut message = NetlinkMessage::from(message);
            message.header.flags = NLM_F_REQUEST | flags;
            handle.request(message, SocketAddr::new(0, 0)).unwrap()
        };
        let add = Message::AddVirtualServer(round_robin(tcp("10.96.0.2:80")));
        // That crate hands on refusals and keeps the ACK.
        assert!(send(add, NLM_F_ACK).next().await.is_none());
        let refused = send(add, NLM_F_ACK).next().await.unwrap();
        let NetlinkPayload::Error(refused) = refused.payload else { panic!("{refused:?}") };
        assert_eq!(refused.raw_code(), -17);
        let listed: Vec<_> = send(Message::ListVirtualServers, NLM_F_DUMP)
            .map(|answer| match answer.payload {
                NetlinkPayload::InnerMessage(message) => message.payload,
                other => panic!("{other:?}"),
            })
            .collect()
            .await;
        let wanted: Vec<_> = client.virtual_servers().unwrap().into_iter().map(Message::VirtualServer).collect();
        assert_eq!(listed, wanted);
        assert_eq!(listed.len(), 2);
    });
}
