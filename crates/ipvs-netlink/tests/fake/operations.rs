//! Random operations, made so that a good share succeeds and every refusal occurs.

use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU8, NonZeroU16};

use ipvs_netlink::fake::Ipvs;
use ipvs_netlink::{
    Family, Forwarding, GueChecksum, Message, Netmask, Persistence, Protocol, RealServer, Scheduler, SchedulerFlags,
    SyncDaemon, SyncRole, Timeouts, Tunnel, VirtualServer, VirtualServerId,
};

use Mostly::{Any, Existing};

/// An interface besides `lo`, with the addresses of [`ADDRESSES`].
pub(crate) const INTERFACE: &str = "dummy0";
pub(crate) const ADDRESSES: [(&str, u8); 3] = [("10.9.0.1", 24), ("fd00:9::1", 64), ("fe80::7", 64)];

/// Most are fine for a real server.
const IPV4: [&str; 20] = [
    "10.1.0.7",
    "10.1.0.8",
    "10.1.0.9",
    "10.1.0.10",
    "10.9.0.1",
    "10.9.0.0",
    "10.9.0.7",
    "127.0.0.1",
    "127.9.9.9",
    "127.0.0.0",
    "0.1.2.3",
    "169.254.1.1",
    "240.0.0.1",
    // And these are not.
    "0.0.0.0",
    "10.9.0.255",
    "127.255.255.255",
    "224.0.0.1",
    "239.1.1.1",
    "255.255.255.255",
    "232.0.0.0",
];
const IPV6: [&str; 20] = [
    "fd00:1::7",
    "fd00:1::8",
    "fd00:1::9",
    "2001:db8::1",
    "fd00:9::1",
    "fd00:9::",
    "fe80::7",
    "fec0::1",
    "::1",
    "::2",
    "::10.1.0.7",
    "100::1",
    "e000::1",
    // And these are not.
    "::",
    "::ffff:10.1.0.7",
    "fe80::8",
    "fe80::",
    "febf::1",
    "ff02::1",
    "ff05::2",
];

/// xorshift64*: a seed tells all.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        // Seeds that are near each other lead far apart; 0 would lead nowhere.
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(high).unwrap() % bound
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }
}

/// What to choose more often than not.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mostly {
    Existing,
    Any,
}
/// A sequence of operations. The next depends on what there is, so that servers are often ones that exist.
pub(crate) struct Operations {
    random: Random,
    /// Whether many real servers are of the other family, which keeps daemons from starting.
    mixed: bool,
}

impl Operations {
    pub(crate) fn new(seed: u64) -> Self {
        Self { random: Random::new(seed), mixed: seed.is_multiple_of(2) }
    }

    pub(crate) fn next(&mut self, ipvs: &Ipvs) -> Message {
        match self.random.below(1000) {
            0..150 => Message::AddVirtualServer(self.virtual_server(ipvs, Any)),
            150..240 => Message::SetVirtualServer(self.virtual_server(ipvs, Existing)),
            240..270 => Message::DeleteVirtualServer(self.id_of(ipvs, Existing)),
            270..290 => Message::GetVirtualServer(self.id_of(ipvs, Existing)),
            290..600 => {
                let id = self.id_of(ipvs, Existing);
                let socket = self.socket_of(ipvs, &id, Any);
                Message::AddRealServer(id, self.real_server(socket))
            }
            600..750 => {
                let id = self.id_of(ipvs, Existing);
                let socket = self.socket_of(ipvs, &id, Existing);
                Message::SetRealServer(id, self.real_server(socket))
            }
            750..880 => {
                let id = self.id_of(ipvs, Existing);
                Message::DeleteRealServer(id, self.socket_of(ipvs, &id, Existing))
            }
            880..900 => Message::ZeroVirtualServer(self.id_of(ipvs, Existing)),
            900..905 => Message::Zero,
            905..910 => Message::Flush,
            910..950 => Message::SetTimeouts(self.timeouts()),
            950..975 => Message::StartSyncDaemon(self.daemon()),
            975..985 => Message::StopSyncDaemon(self.role()),
            985..988 => Message::GetTimeouts,
            988..991 => Message::GetInfo,
            991..994 => Message::ListVirtualServers,
            994..997 => Message::ListRealServers(self.id()),
            _ => Message::ListSyncDaemons,
        }
    }

    fn id(&mut self) -> VirtualServerId {
        if self.random.one_in(4) {
            let mark = self.random.pick(&[1, 2, u32::MAX]);
            return VirtualServerId::firewall_mark(mark, self.random.pick(&[Family::Ipv4, Family::Ipv6])).unwrap();
        }
        let protocol = self.random.pick(&[
            Protocol::Tcp,
            Protocol::Tcp,
            Protocol::Tcp,
            Protocol::Udp,
            Protocol::Sctp,
            // TCP again, and a number that fits no packet.
            Protocol::Other(6),
            Protocol::Other(300),
        ]);
        let ip = self.random.pick(&["10.96.0.1", "10.96.0.2", "224.0.0.1", "fd00:96::1", "fd00:96::2", "::"]);
        let port = self.random.pick(&[80, 80, 80, 443, 0, 21]);
        VirtualServerId::address(protocol, SocketAddr::new(ip.parse().unwrap(), port))
    }

    fn id_of(&mut self, ipvs: &Ipvs, mostly: Mostly) -> VirtualServerId {
        let existing = ipvs.virtual_servers();
        let is_existing = if mostly == Existing { !self.random.one_in(8) } else { self.random.one_in(4) };
        if is_existing && !existing.is_empty() { self.random.pick(&existing).server.id } else { self.id() }
    }

    fn virtual_server(&mut self, ipvs: &Ipvs, mostly: Mostly) -> VirtualServer {
        let id = self.id_of(ipvs, mostly);
        let scheduler = match self.random.below(16) {
            0 => Scheduler::Other("nosuch".parse().unwrap()),
            1 => Scheduler::Other("none".parse().unwrap()),
            2 => Scheduler::Other("rr".parse().unwrap()),
            _ => self.random.pick(&Scheduler::ALL),
        };
        let flags = [SchedulerFlags::NONE, SchedulerFlags::FLAG_1, SchedulerFlags::FLAG_2, SchedulerFlags::FLAG_3];
        VirtualServer {
            scheduler_flags: self.random.pick(&flags).union(self.random.pick(&flags)),
            persistence: if self.random.one_in(2) { Some(self.persistence(id.family())) } else { None },
            engine: match self.random.below(16) {
                0 => Some("nosuch".parse().unwrap()),
                1 | 2 => Some("sip".parse().unwrap()),
                _ => None,
            },
            one_packet: self.random.one_in(4),
            ..VirtualServer::new(id, scheduler)
        }
    }

    fn persistence(&mut self, family: Family) -> Persistence {
        let family = if self.random.one_in(30) { other(family) } else { family };
        let netmask = match family {
            Family::Ipv4 => {
                let mask = self.random.pick(&["255.255.255.255", "255.0.0.0", "0.0.0.0", "1.2.3.4"]);
                Netmask::V4(mask.parse().unwrap())
            }
            Family::Ipv6 => Netmask::V6(self.random.pick(&[128, 128, 64, 1, 32, 127, 0, 129, 255])),
        };
        Persistence {
            timeout: self.random.pick(&[
                0,
                1,
                60,
                10_800,
                2_678_400,
                4_294_967,
                4_294_968,
                42_949_672,
                42_949_673,
                123_456_789,
                u32::MAX,
            ]),
            netmask,
        }
    }

    fn socket_of(&mut self, ipvs: &Ipvs, id: &VirtualServerId, mostly: Mostly) -> SocketAddr {
        let existing = ipvs.real_servers(id);
        let is_existing = if mostly == Existing { !self.random.one_in(6) } else { self.random.one_in(10) };
        if is_existing && !existing.is_empty() {
            return self.random.pick(&existing).server.socket_address();
        }
        let is_other = self.random.one_in(if self.mixed { 15 } else { 600 });
        let family = if is_other { other(id.family()) } else { id.family() };
        let pool = if family == Family::Ipv4 { IPV4 } else { IPV6 };
        let ip: IpAddr = self.random.pick(&pool).parse().unwrap();
        SocketAddr::new(ip, self.random.pick(&[80, 8080, 0]))
    }

    fn real_server(&mut self, socket: SocketAddr) -> RealServer {
        let forwarding = match self.random.below(10) {
            0..3 => Forwarding::Masquerade,
            3 => Forwarding::Local,
            4 => Forwarding::DirectRoute,
            5 => Forwarding::Bypass,
            6 => Forwarding::Other(self.random.pick(&[0, 2, 3, 5, 6, 7, 10, 255])),
            _ => Forwarding::Tunnel(self.tunnel()),
        };
        let thresholds = [(0, 0), (0, 0), (0, 0), (10, 0), (10, 5), (10, 10), (u32::MAX, 1 << 31)];
        let most = i32::MAX.unsigned_abs();
        let weights = [0, 1, 1, 1, 2, 100, 65_535, 65_536, most - 1, most];
        let (upper_threshold, lower_threshold) = match self.random.below(25) {
            0 => self.random.pick(&[(0, 1), (9, 10), (1, u32::MAX)]),
            _ => self.random.pick(&thresholds),
        };
        let weight = match self.random.below(25) {
            0 => self.random.pick(&[most + 1, u32::MAX]),
            _ => self.random.pick(&weights),
        };
        RealServer { forwarding, weight, upper_threshold, lower_threshold, ..RealServer::new(socket) }
    }

    fn tunnel(&mut self) -> Tunnel {
        let port = NonZeroU16::new(6080).unwrap();
        self.random.pick(&[
            Tunnel::IpIp,
            Tunnel::Gue { port, checksum: GueChecksum::None },
            Tunnel::Gue { port, checksum: GueChecksum::Udp },
            Tunnel::Gue { port, checksum: GueChecksum::Remote },
            Tunnel::Gre { checksum: false },
            Tunnel::Gre { checksum: true },
            Tunnel::Other { kind: 0, port: 0, flags: 0 },
            Tunnel::Other { kind: 0, port: 7, flags: 2 },
            // GUE without a port.
            Tunnel::Other { kind: 1, port: 0, flags: 1 },
            Tunnel::Other { kind: 1, port: 6080, flags: 3 },
            Tunnel::Other { kind: 2, port: 0, flags: 1 },
            Tunnel::Other { kind: 255, port: 0, flags: u16::MAX },
        ])
    }

    fn timeouts(&mut self) -> Timeouts {
        // The limits of 1000, 250 and 100 ticks a second are among them.
        let seconds = [0, 0, 0, 1, 900, 2_147_483, 2_147_484, 8_589_934, 8_589_935, 21_474_836];
        let invalid = [21_474_837, 1 << 31, u32::MAX];
        let mut any = || {
            if self.random.one_in(12) { self.random.pick(&invalid) } else { self.random.pick(&seconds) }
        };
        Timeouts { tcp: any(), tcp_fin: any(), udp: any() }
    }

    fn role(&mut self) -> SyncRole {
        self.random.pick(&[SyncRole::Master, SyncRole::Backup])
    }

    fn daemon(&mut self) -> SyncDaemon {
        let interface = self.random.pick(&["lo", INTERFACE, INTERFACE, "nosuch"]);
        let group =
            ["", "", "224.0.0.81", "239.1.1.1", "10.0.0.1", "ff02::81", "ff05::1", "fd00::1", "::ffff:224.0.0.1"];
        SyncDaemon {
            sync_id: self.random.pick(&[0, 1, 255]),
            max_length: NonZeroU16::new(self.random.pick(&[0, 0, 1, 500, 1023, 1024, 1400, 65_507, u16::MAX])),
            group: self.random.pick(&group).parse().ok(),
            port: NonZeroU16::new(self.random.pick(&[0, 8849, 7])),
            ttl: NonZeroU8::new(self.random.pick(&[0, 1, 255])),
            ..SyncDaemon::new(self.role(), interface.parse().unwrap())
        }
    }
}

fn other(family: Family) -> Family {
    match family {
        Family::Ipv4 => Family::Ipv6,
        Family::Ipv6 => Family::Ipv4,
    }
}
