//! The kernel to compare with.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::num::NonZeroU32;

use ipvs_netlink::fake::{Interface, Ipvs, Kernel};
use ipvs_netlink::{Error, Message, RealServer, SyncDaemon, SyncRole, Timeouts};
use lab::link;
use netlink_batch::Socket;
use netlink_batch::protocols::NETLINK_GENERIC;
use netlink_packet_generic::GenlMessage;
use netlink_packet_generic::constants::GENL_ID_CTRL;
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};

use crate::common::{ExclusiveClient, client, real, round_robin, tcp};
use crate::operations::{ADDRESSES, INTERFACE};

/// A network namespace with an interface and addresses, and what its kernel has.
pub(crate) struct Lab {
    client: ExclusiveClient,
    daemons: Daemons,
    kernel: Kernel,
    timeouts: Timeouts,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let mut client = client();
        link::add_dummy(INTERFACE, &[]).unwrap();
        let mut kernel = Kernel::default();
        for (address, prefix) in ADDRESSES {
            link::add_address(INTERFACE, &format!("{address}/{prefix}")).unwrap();
            kernel.addresses.insert((address.parse().unwrap(), prefix));
        }
        kernel.interfaces.insert(INTERFACE.parse().unwrap(), Interface { mtu: 1500, routes_ipv6_multicast: true });
        // Where tables can be resized, they are made with the first virtual server.
        client.add_virtual_server(&round_robin(tcp("10.96.0.1:80"))).unwrap();
        let large = RealServer { upper_threshold: u32::MAX, ..real("10.1.0.7:80") };
        if client.add_real_server(&tcp("10.96.0.1:80"), &large).is_ok() {
            kernel.largest_upper_threshold = u32::MAX;
        }
        client.flush().unwrap();
        kernel.connection_table_size = client.info().unwrap().connection_table_size;
        let timeouts = client.timeouts().unwrap();
        // Which of them it is shows in the limit of timeouts.
        let ticks = [100, 250, 300, 1000].into_iter().find(|ticks| {
            let longest = i32::MAX.unsigned_abs() / ticks;
            let mut set = |tcp| client.set_timeouts(Timeouts { tcp, ..Timeouts::default() }).is_ok();
            set(longest) && !set(longest + 1)
        });
        kernel.ticks_per_second = NonZeroU32::new(ticks.unwrap()).unwrap();
        Self { client, daemons: Daemons::connect(), kernel, timeouts }
    }

    /// Empties the kernel, and makes a fake like it.
    pub(crate) fn fresh(&mut self) -> Ipvs {
        let stop = [SyncRole::Master, SyncRole::Backup].map(Message::StopSyncDaemon);
        // That of one that does not run fails.
        drop(self.apply(&stop));
        self.client.flush().unwrap();
        self.client.set_timeouts(self.timeouts).unwrap();
        let fake = Ipvs::new(self.kernel.clone());
        assert_eq!(self.difference(&fake), None);
        fake
    }

    pub(crate) fn apply(&mut self, messages: &[Message]) -> Vec<Result<(), Error>> {
        self.client.apply(messages).unwrap()
    }

    /// Compares all that can be listed. Virtual servers have an order of their own in each; real servers come in the same.
    pub(crate) fn difference(&mut self, fake: &Ipvs) -> Option<String> {
        let by_id = |entries: Vec<ipvs_netlink::VirtualServerEntry>| -> BTreeMap<_, _> {
            entries.into_iter().map(|entry| (entry.server.id, entry)).collect()
        };
        let listed = by_id(self.client.virtual_servers().unwrap());
        let mut real_servers = |id| self.client.real_servers(id).unwrap();
        differ("virtual servers", &by_id(fake.virtual_servers()), &listed)
            .or_else(|| {
                listed
                    .keys()
                    .find_map(|id| differ(&format!("real servers of {id}"), &fake.real_servers(id), &real_servers(id)))
            })
            .or_else(|| differ("timeouts", &fake.timeouts(), &self.client.timeouts().unwrap()))
            .or_else(|| differ("info", &fake.info(), &self.client.info().unwrap()))
            .or_else(|| differ("daemons", &fake.sync_daemons(), &self.daemons.list()))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // They hold the network namespace.
        drop(self.apply(&[SyncRole::Master, SyncRole::Backup].map(Message::StopSyncDaemon)));
    }
}

fn differ<T: Debug + PartialEq>(what: &str, of_fake: &T, of_kernel: &T) -> Option<String> {
    (of_fake != of_kernel).then(|| format!("{what}: fake {of_fake:#?}, kernel {of_kernel:#?}"))
}

/// A socket that lists the daemons.
struct Daemons {
    socket: Socket,
    family: u16,
}

impl Daemons {
    fn connect() -> Self {
        let mut socket = Socket::open(NETLINK_GENERIC).unwrap();
        let ask = GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![GenlCtrlAttrs::FamilyName("IPVS".into())] };
        let mut ask = GenlMessage::from_payload(ask);
        ask.set_resolved_family_id(GENL_ID_CTRL);
        let mut family = None;
        let is_id = |attribute: &GenlCtrlAttrs| match attribute {
            GenlCtrlAttrs::FamilyId(id) => Some(*id),
            _ => None,
        };
        socket
            .request(&ask.into(), |answer: GenlMessage<GenlCtrl>| family = answer.payload.nlas.iter().find_map(is_id))
            .unwrap();
        Self { socket, family: family.unwrap() }
    }

    fn list(&mut self) -> Vec<SyncDaemon> {
        let mut ask = GenlMessage::from_payload(Message::ListSyncDaemons);
        ask.set_resolved_family_id(self.family);
        let mut daemons = Vec::new();
        let each = |answer: GenlMessage<Message>| {
            if let Message::SyncDaemon(daemon) = answer.payload {
                daemons.push(daemon);
            }
        };
        self.socket.dump(&ask, each).unwrap();
        daemons
    }
}
