//! The kernel's files of connections and totals, without a kernel.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fmt::Write;
use std::io::{self, BufReader, Read};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipvs_netlink::{Connection, ConnectionState as State, Connections, Origin, ProcError, Protocol, Template, Totals};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};

/// `ip_vs_conn` as Linux 6.1 writes it, of connections made in the lab.
const CONNECTIONS: &str = "\
Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData
TCP 0A600001 E92C 0A600001 0050 0A010007 1F90 TIME_WAIT       119
TCP fd00:0096:0000:0000:0000:0000:0000:0001 B472 fd00:0096:0000:0000:0000:0000:0000:0001 0050 fd00:0001:0000:0000:0000:0000:0000:0007 1F90 ESTABLISHED     900
UDP 0A600001 9BF4 0A600001 0050 fd07:0000:0000:0000:0000:0000:0000:0009 0050 UDP             299
UDP fd00:0096:0000:0000:0000:0000:0000:0001 88F5 fd00:0096:0000:0000:0000:0000:0000:0001 0050 C0A80709 0050 UDP             300
SCTP 0A600001 1389 0A600001 0050 0A010007 1F90 REJECTED          4
UDP 0A600001 0000 0A600001 0050 0A010008 1F90 NONE             60
UDP 0A600001 0000 0A600001 FFFF 0A010007 FFFF ASSURED          59
UDP 0A600001 0000 0A600001 13C4 0A010007 13C4 NONE             60 sip 7~%[{?}]@10.96.0.1
IP  0A600001 0000 00070007 0000 0A010007 0000 NONE             59
IP  fd00:0096:0000:0000:0000:0000:0000:0001 0000 0007:0007:0000:0000:0000:0000:0000:0000 0000 fd00:0001:0000:0000:0000:0000:0000:0007 0000 NONE             60
";

/// `ip_vs_conn_sync`, as above.
const WITH_ORIGIN: &str = "\
Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Origin Expires
TCP 0A600001 E920 0A600001 0050 0A010007 1F90 ESTABLISHED SYNC       899
";

/// `ip_vs_stats` and `ip_vs_stats_percpu`, as above.
const STATS: &str = "   Total Incoming Outgoing         Incoming         Outgoing
   Conns  Packets  Packets            Bytes            Bytes
       2        2        0               9C                0

 Conns/s   Pkts/s   Pkts/s          Bytes/s          Bytes/s
       0        0        0               13                0
";
const STATS_BY_CPU: &str = "       Total Incoming Outgoing         Incoming         Outgoing
CPU    Conns  Packets  Packets            Bytes            Bytes
  0        2        2        0               9C                0
  ~        2        2        0               9C                0

     Conns/s   Pkts/s   Pkts/s          Bytes/s          Bytes/s
           0        0        0               13                0
";

fn read(text: impl AsRef<[u8]>) -> Vec<Result<Connection, ProcError>> {
    Connections::read(text.as_ref()).collect()
}

#[test]
fn what_the_kernel_writes_is_understood() {
    let connections: Vec<_> = read(CONNECTIONS).into_iter().map(Result::unwrap).collect();
    let addresses: Vec<_> = connections
        .iter()
        .map(|c| {
            let state = (c.state.name(), c.expires.as_secs());
            (
                c.protocol.number(),
                c.client.to_string(),
                c.virtual_address.to_string(),
                c.real_address.to_string(),
                state,
            )
        })
        .collect();
    let expected = [
        (6, "10.96.0.1:59692", "10.96.0.1:80", "10.1.0.7:8080", ("TIME_WAIT", 119)),
        (6, "[fd00:96::1]:46194", "[fd00:96::1]:80", "[fd00:1::7]:8080", ("ESTABLISHED", 900)),
        (17, "10.96.0.1:39924", "10.96.0.1:80", "[fd07::9]:80", ("UDP", 299)),
        (17, "[fd00:96::1]:35061", "[fd00:96::1]:80", "192.168.7.9:80", ("UDP", 300)),
        (132, "10.96.0.1:5001", "10.96.0.1:80", "10.1.0.7:8080", ("REJECTED", 4)),
        (17, "10.96.0.1:0", "10.96.0.1:80", "10.1.0.8:8080", ("NONE", 60)),
        (17, "10.96.0.1:0", "10.96.0.1:65535", "10.1.0.7:65535", ("ASSURED", 59)),
        (17, "10.96.0.1:0", "10.96.0.1:5060", "10.1.0.7:5060", ("NONE", 60)),
        (0, "10.96.0.1:0", "0.7.0.7:0", "10.1.0.7:0", ("NONE", 59)),
        (0, "[fd00:96::1]:0", "[7:7::]:0", "[fd00:1::7]:0", ("NONE", 60)),
    ];
    let expected = expected.map(|(protocol, client, to, real, state)| {
        (protocol, client.to_owned(), to.to_owned(), real.to_owned(), state)
    });
    assert_eq!(addresses, expected);
    assert!(connections.iter().all(|connection| connection.origin.is_none()));

    let engines: Vec<_> = connections.iter().filter_map(|connection| connection.persistence.as_ref()).collect();
    assert_eq!((engines.len(), engines[0].engine.as_str()), (1, "sip"));
    assert_eq!(engines[0].data, b"7~%[{?}]@10.96.0.1");

    let templates: Vec<_> = connections
        .iter()
        .map(Connection::template)
        .map(|template| {
            let Template { firewall_mark, every_port, assured, invalidated, .. } = template?;
            Some((firewall_mark.map_or(0, u32::from), every_port, assured, invalidated))
        })
        .collect();
    let plain = Some((0, false, false, false));
    let invalid = Some((0, false, true, true));
    let mark = Some((0x7_0007, true, false, false));
    assert_eq!(templates, [None, None, None, None, None, plain, invalid, plain, mark, mark]);

    let synchronized = read(WITH_ORIGIN).pop().unwrap().unwrap();
    assert_eq!(synchronized.origin, Some(Origin::Synchronized));
    assert_eq!((synchronized.state, synchronized.expires), (State::Established, Duration::from_secs(899)));
    assert_eq!(read(WITH_ORIGIN.replace("SYNC ", "LOCAL")).pop().unwrap().unwrap().origin, Some(Origin::Local));

    for (text, cpus) in [(STATS, 0), (STATS_BY_CPU, 1)] {
        let totals = Totals::read(text.as_bytes()).unwrap();
        let stats = totals.stats;
        assert_eq!((stats.connections, stats.incoming_packets, stats.incoming_bytes), (2, 2, 156));
        assert_eq!((stats.outgoing_bytes, stats.connection_rate, stats.incoming_byte_rate), (0, 0, 19));
        assert_eq!(totals.cpus.iter().filter(|cpu| cpu.cpu == 0 && cpu.incoming_bytes == 156).count(), cpus);
        assert_eq!(totals.cpus.len(), cpus);
    }
}

#[test]
fn an_invalidated_template_has_lost_one_or_both_of_its_ports() {
    for (virtual_port, real_port, invalidated) in
        [("FFFF", "FFFF", true), ("0050", "FFFF", true), ("0050", "1F90", false)]
    {
        let line = format!("UDP 0A600001 0000 0A600001 {virtual_port} 0A010007 {real_port} ASSURED     59\n");
        assert_eq!(read(line)[0].as_ref().unwrap().template().unwrap().invalidated, invalidated);
    }
}

#[test]
fn a_connection_from_port_0_is_no_template() {
    for state in ["UDP", "LISTEN", "SYN_RECV", "ESTABLISHED"] {
        let line = format!("TCP 0A600001 0000 0A600001 0050 0A010007 1F90 {state:11} 60\n");
        assert_eq!(read(line)[0].as_ref().unwrap().template(), None);
    }
}

#[test]
fn a_bad_line_is_named_and_harms_no_other() {
    let good = "TCP 0A600001 E92C 0A600001 0050 0A010007 1F90 TIME_WAIT       119";
    for (line, fault) in [
        ("", "it is empty"),
        ("   ", "it is empty"),
        ("EGP 0A600001 E92C 0A600001 0050 0A010007 1F90 NONE 1", "its protocol is unknown"),
        ("IP_65536 0A600001 E92C 0A600001 0050 0A010007 1F90 NONE 1", "its protocol is unknown"),
        ("TCP", "its client is not an address and a port in hexadecimal"),
        ("TCP 0A60001 E92C", "its client is not an address and a port in hexadecimal"),
        ("TCP +A600001 E92C", "its client is not an address and a port in hexadecimal"),
        ("TCP fd00:0096:0000:0000:0000:0000:0001 E92C", "its client is not an address and a port in hexadecimal"),
        ("TCP fd00::1 E92C", "its client is not an address and a port in hexadecimal"),
        ("TCP 0A600001 80", "its client is not an address and a port in hexadecimal"),
        ("TCP 0A600001 E92C 0A600001", "its virtual address is not an address and a port in hexadecimal"),
        (
            "TCP 0A600001 E92C fd00:0096:0000:0000:0000:0000:0000:0001 0050 0A010007 1F90 NONE 1",
            "its client and its virtual address are of different families",
        ),
        ("TCP 0A600001 E92C 0A600001 0050 0A010007 G", "its real address is not an address and a port in hexadecimal"),
        ("TCP 0A600001 E92C 0A600001 0050 0A010007 1F90", "it has no state"),
        ("TCP 0A600001 E92C 0A600001 0050 0A010007 1F90 A_LONG_LONG_NAME 1", "its state is no name of up to 15 bytes"),
        ("TCP 0A600001 E92C 0A600001 0050 0A010007 1F90 NONE", "the seconds to its end are not a number of 32 bits"),
        (
            "TCP 0A600001 E92C 0A600001 0050 0A010007 1F90 NONE SYNC",
            "the seconds to its end are not a number of 32 bits",
        ),
        (
            "TCP 0A600001 E92C 0A600001 0050 0A010007 1F90 NONE 4294967296",
            "the seconds to its end are not a number of 32 bits",
        ),
        (
            "TCP 0A600001 E92C 0A600001 0050 0A010007 1F90 NONE 1 a_long_long_name data",
            "its persistence engine is no name of up to 15 bytes",
        ),
    ] {
        let lines = read(format!("{good}\n{line}\n{good}"));
        assert!(lines.len() == 3 && lines[0].is_ok() && lines[2].is_ok(), "{line}: {lines:?}");
        let error = lines[1].as_ref().unwrap_err().to_string();
        assert_eq!(error, format!("cannot understand line 2, {line:?}: {fault}"));
    }
    let long = "x".repeat(1000);
    assert!(read(&long)[0].as_ref().unwrap_err().to_string().len() < 300);
}

#[test]
fn nothing_follows_a_failed_read() {
    struct Failing;
    impl Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("out of order"))
        }
    }
    let reader = || BufReader::new(CONNECTIONS.as_bytes()).chain(BufReader::new(Failing));
    let connections: Vec<_> = Connections::read(reader()).collect();
    assert_eq!(connections.len(), 11);
    assert_eq!(connections[10].as_ref().unwrap_err().to_string(), "cannot read line 12: out of order");
    assert!(Totals::read(BufReader::new(Failing)).is_err());
}

#[test]
fn totals_that_are_cut_short_or_garbled_name_the_line() {
    for text in [STATS, STATS_BY_CPU] {
        let lines: Vec<_> = text.lines().collect();
        for count in 0..lines.len() {
            let error = Totals::read(lines[..count].join("\n").as_bytes()).unwrap_err();
            assert!(error.to_string().starts_with("cannot understand line "), "{error}");
        }
    }
    for (from, to, error) in [
        ("9C", "9G", "3, \"       2        2        0               9G                0\": it has not five counters"),
        ("13", "1 3", "6, \"       0        0        0               1 3                0\": it has not five rates"),
        ("       2        2", "~        2 2 2", "3, \"~        2 2 2        0               9C                0\": "),
        (
            "       2        2",
            "G        2 2",
            "3, \"G        2 2        0               9C                0\": the number",
        ),
    ] {
        let text = Totals::read(STATS.replacen(from, to, 1).as_bytes()).unwrap_err().to_string();
        assert!(text.starts_with(&format!("cannot understand line {error}")), "{text}");
    }
}

#[test]
fn a_kernel_without_the_files_is_told_from_a_broken_one() {
    let Err(error) = Connections::of_this_namespace() else { return };
    assert!(matches!(&error, ProcError::Open { cause, .. } if cause.kind() == io::ErrorKind::NotFound));
    assert_eq!(
        error.to_string(),
        "cannot open /proc/thread-self/net/ip_vs_conn: No such file or directory (os error 2): this kernel has no IPVS: \
         load it with `modprobe ip_vs` (CONFIG_IP_VS)"
    );
    assert!(Connections::of_this_namespace_with_origin().is_err());
    assert!(Totals::of_this_namespace().is_err() && Totals::of_this_namespace_by_cpu().is_err());
}

/// The fields of a line.
#[derive(Clone, Debug)]
struct KernelLine {
    protocol: Protocol,
    client: SocketAddr,
    virtual_address: SocketAddr,
    real_address: SocketAddr,
    state: State,
    expires: u32,
    origin: Option<Origin>,
    persistence: Option<(String, Vec<u8>)>,
}

fn hex(address: SocketAddr) -> String {
    let mut text = String::new();
    match address.ip() {
        IpAddr::V4(ip) => write!(text, "{:08X}", ip.to_bits()).unwrap(),
        IpAddr::V6(ip) => text.push_str(&ip.segments().map(|group| format!("{group:04x}")).join(":")),
    }
    write!(text, " {:04X}", address.port()).unwrap();
    text
}

impl KernelLine {
    /// The line as the kernel writes it.
    fn encode(&self) -> Vec<u8> {
        let protocol = match self.protocol {
            Protocol::Other(0) => "IP".to_owned(),
            Protocol::Other(1) => "ICMP".to_owned(),
            Protocol::Other(58) => "ICMPv6".to_owned(),
            Protocol::Other(number) => format!("IP_{number}"),
            known => known.to_string(),
        };
        let [client, to, real] = [self.client, self.virtual_address, self.real_address].map(hex);
        let origin = self.origin.map_or(String::new(), |origin| format!(" {origin:6}"));
        let line = format!("{protocol:3} {client} {to} {real} {:11}{origin} {:7}", self.state, self.expires);
        let mut line = line.into_bytes();
        if let Some((engine, data)) = &self.persistence {
            line.extend(format!(" {engine} ").bytes().chain(data.iter().copied()));
        }
        line.push(b'\n');
        line
    }

    fn matches(&self, connection: &Connection) -> bool {
        let persistence = connection.persistence.as_ref().map(|p| (p.engine.as_str().to_owned(), p.data.clone()));
        (connection.protocol, connection.client, connection.virtual_address, connection.real_address)
            == (self.protocol, self.client, self.virtual_address, self.real_address)
            && (connection.state, connection.expires, connection.origin)
                == (self.state, Duration::from_secs(self.expires.into()), self.origin)
            && persistence == self.persistence
    }
}

prop_compose! {
    fn any_line()(
        protocol in prop_oneof![select(vec![0, 1, 6, 17, 58, 132]), any::<u16>()],
        (client, virtual_address) in prop_oneof![
            any::<([u8; 4], u16, [u8; 4], u16)>().prop_map(|(a, b, c, d)| (SocketAddr::from((a, b)), SocketAddr::from((c, d)))),
            any::<([u8; 16], u16, [u8; 16], u16)>().prop_map(|(a, b, c, d)| (SocketAddr::from((a, b)), SocketAddr::from((c, d)))),
        ],
        real_address in any::<(IpAddr, u16)>(),
        state in prop_oneof![select(State::ALL.to_vec()), "[!-~]{1,15}".prop_map(|name| name.parse().unwrap())],
        expires in any::<u32>(),
        origin in option::of(select(vec![Origin::Local, Origin::Synchronized])),
        persistence in option::of(("[!-~]{1,15}", vec(any::<u8>().prop_filter("the end", |byte| *byte != b'\n'), 0..300))),
    ) -> KernelLine {
        let protocol = Protocol::from_number(protocol);
        let real_address = real_address.into();
        KernelLine { protocol, client, virtual_address, real_address, state, expires, origin, persistence }
    }
}

/// A line with some of its bytes changed.
fn any_corrupted_line() -> impl Strategy<Value = Vec<u8>> {
    (any_line(), vec((any::<Index>(), any::<u8>()), 1..4)).prop_map(|(line, changes)| {
        let mut line = line.encode();
        for (place, byte) in changes {
            let place = place.index(line.len());
            line[place] = byte;
        }
        line.push(b'\n');
        line
    })
}

fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![vec(any::<u8>(), 0..300), "[0-9A-F ~\n]{0,200}".prop_map(String::into_bytes), any_corrupted_line()]
}

proptest! {
    #[test]
    fn a_connection_is_read_as_it_was_written(lines in vec(any_line(), 0..8)) {
        let text: Vec<u8> = lines.iter().flat_map(KernelLine::encode).collect();
        let connections = read(text);
        prop_assert_eq!(connections.len(), lines.len());
        for (line, connection) in lines.iter().zip(connections) {
            let connection = connection.unwrap();
            prop_assert!(line.matches(&connection), "{line:?} is not {connection:?}");
            let template = connection.template();
            prop_assert!(template.is_none() || line.client.port() == 0);
            prop_assert!(template.and_then(|template| template.firewall_mark).is_none() || line.protocol.number() == 0);
        }
    }

    #[test]
    fn no_bytes_make_it_panic_and_each_line_is_one_item(bytes in any_bytes()) {
        let header = usize::from(bytes.starts_with(b"Pro "));
        prop_assert_eq!(read(&bytes).len(), bytes.split_inclusive(|byte| *byte == b'\n').count() - header);
        for connection in read(&bytes) {
            match connection {
                Ok(connection) => drop(connection.template()),
                Err(error) => prop_assert!(!error.to_string().is_empty()),
            }
        }
        let _ = Totals::read(bytes.as_slice());
    }

    #[test]
    fn good_lines_come_through_whatever_is_between(good in any_line(), bad in any_bytes()) {
        let text = [good.encode(), bad, b"\n".to_vec(), good.encode()].concat();
        let connections = read(text);
        for end in [connections.first(), connections.last()] {
            prop_assert!(good.matches(end.unwrap().as_ref().unwrap()));
        }
    }

    #[test]
    fn totals_are_read_as_they_were_written(all in any::<[[u64; 5]; 2]>(), cpus in vec(any::<[u64; 5]>(), 0..20)) {
        let row = |n: &[u64; 5]| format!("{:8X} {:8X} {:8X} {:16X} {:16X}", n[0], n[1], n[2], n[3], n[4]);
        let mut text = "names\nnames\n".to_owned();
        for (number, counters) in cpus.iter().enumerate() {
            writeln!(text, "{number:3X} {}", row(counters)).unwrap();
        }
        let tilde = if cpus.is_empty() { "" } else { "  ~ " };
        writeln!(text, "{tilde}{}\n\nnames\n    {}", row(&all[0]), row(&all[1])).unwrap();
        let totals = Totals::read(text.as_bytes()).unwrap();
        let s = totals.stats;
        let counters = [s.connections, s.incoming_packets, s.outgoing_packets, s.incoming_bytes, s.outgoing_bytes];
        let rates = [
            s.connection_rate, s.incoming_packet_rate, s.outgoing_packet_rate, s.incoming_byte_rate, s.outgoing_byte_rate,
        ];
        prop_assert_eq!([counters, rates], all);
        let read: Vec<_> = totals
            .cpus
            .iter()
            .map(|c| [c.connections, c.incoming_packets, c.outgoing_packets, c.incoming_bytes, c.outgoing_bytes])
            .collect();
        prop_assert_eq!(read, cpus);
        prop_assert!(totals.cpus.iter().zip(0..).all(|(cpu, number)| cpu.cpu == number));
    }
}

#[test]
fn states_have_the_names_of_the_kernel() {
    for state in State::ALL {
        assert_eq!(state.name().parse(), Ok(state));
        assert!(!matches!(state, State::Other(_)));
    }
    assert!(matches!("ERR!".parse(), Ok(State::Other(_))));
    assert!("".parse::<State>().is_err());
    assert_eq!(format!("{:11}|", State::Udp), "UDP        |");
}
