//! The fake by itself, and in the lab against a kernel: what the two say to the same operations.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../common/mod.rs"]
mod common;
mod coverage;
mod kernel;
mod operations;
mod rules;

use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use common::{client, round_robin, tcp};

use coverage::{Coverage, outcome};
use ipvs_netlink::fake::Ipvs;
use ipvs_netlink::{Error, Message, RealServer, RealServerEntry};
use kernel::Lab;
use lab::wait::LIMIT;
use operations::Operations;

const SEQUENCES: u64 = 100;
const OPERATIONS: usize = 1000;
/// Operations that go to the kernel at once.
const AT_ONCE: usize = 40;
/// Everything is listed and compared after so many of these.
const BATCHES_BETWEEN_LISTS: usize = 5;

/// What has to occur, or nothing is known about it. Missing is `EAFNOSUPPORT`, for which a kernel without IPv6 would have to
/// be started; the fake's own tests have it.
const EXPECTED: [(&str, &str); 16] = [
    ("NEW_SERVICE", "ok EEXIST ENOENT EINVAL unsent"),
    ("SET_SERVICE", "ok ESRCH ENOENT EINVAL unsent"),
    ("DEL_SERVICE", "ok ESRCH"),
    ("GET_SERVICE", "ok ESRCH EINVAL"),
    ("NEW_DEST", "ok EEXIST ESRCH EINVAL ERANGE"),
    ("SET_DEST", "ok ENOENT ESRCH EINVAL ERANGE"),
    ("DEL_DEST", "ok ENOENT ESRCH"),
    ("GET_DEST", "EOPNOTSUPP"),
    ("NEW_DAEMON", "ok EEXIST ENODEV EINVAL ENETUNREACH"),
    ("DEL_DAEMON", "ok ESRCH"),
    ("GET_DAEMON", "EOPNOTSUPP"),
    ("SET_CONFIG", "ok EINVAL"),
    ("GET_CONFIG", "ok"),
    ("GET_INFO", "ok"),
    ("ZERO", "ok ESRCH"),
    ("FLUSH", "ok"),
];

/// Where fake and kernel part, and how they came there.
struct Difference {
    played: Vec<Message>,
    text: String,
}

/// Plays operations to a fresh fake and to the kernel, emptied.
fn play(
    lab: &mut Lab,
    coverage: &mut Coverage,
    mut next: impl FnMut(&Ipvs) -> Option<Message>,
) -> Result<(), Difference> {
    let mut fake = lab.fresh();
    let mut played: Vec<Message> = Vec::new();
    for batch in 1.. {
        let mut results = Vec::new();
        let first = played.len();
        while results.len() < AT_ONCE {
            let Some(message) = next(&fake) else { break };
            played.push(message);
            results.extend(fake.apply(&[message]));
        }
        let of_kernel = lab.apply(&played[first..]);
        assert_eq!(of_kernel.len(), results.len());
        for (index, (by_fake, by_kernel)) in results.iter().zip(&of_kernel).enumerate() {
            coverage.count(&played[first + index], by_kernel);
            if !is_same(by_fake, by_kernel) {
                played.truncate(first + index + 1);
                let text = format!("operation {}: fake {by_fake:?}, kernel {by_kernel:?}", first + index);
                return Err(Difference { played, text });
            }
        }
        let is_end = results.len() < AT_ONCE;
        if (is_end || batch % BATCHES_BETWEEN_LISTS == 0)
            && let Some(text) = lab.difference(&fake)
        {
            let text = format!("after {} operations: {text}", played.len());
            return Err(Difference { played, text });
        }
        if is_end {
            break;
        }
    }
    Ok(())
}

/// To the word, as the client tells it.
fn is_same(by_fake: &Result<(), Error>, by_kernel: &Result<(), Error>) -> bool {
    match (by_fake, by_kernel) {
        (Ok(()), Ok(())) => true,
        (Err(by_fake), Err(by_kernel)) => by_fake.to_string() == by_kernel.to_string(),
        _ => false,
    }
}

/// Leaves out what is not needed for there to be a difference.
fn shrink(lab: &mut Lab, mut difference: Difference) -> Difference {
    let mut length = difference.played.len() / 2;
    while length > 0 {
        let mut start = 0;
        while start < difference.played.len() {
            let end = (start + length).min(difference.played.len());
            let mut rest = [&difference.played[..start], &difference.played[end..]].concat().into_iter();
            match play(lab, &mut Coverage::default(), |_| rest.next()) {
                Err(smaller) => difference = smaller,
                Ok(()) => start += length,
            }
        }
        length /= 2;
    }
    difference
}

fn lines(messages: &[Message]) -> String {
    messages.iter().fold(String::new(), |lines, message| lines + &format!("\n  {message:?}"))
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn fake_and_kernel_agree_on_100_000_operations() {
    let started = Instant::now();
    let mut lab = Lab::new();
    let mut coverage = Coverage::default();
    for seed in 0..SEQUENCES {
        let mut operations = Operations::new(seed);
        let mut left = OPERATIONS;
        let result = play(&mut lab, &mut coverage, |fake| {
            left = left.checked_sub(1)?;
            Some(operations.next(fake))
        });
        if let Err(difference) = result {
            let last = lines(&difference.played[difference.played.len().saturating_sub(20)..]);
            let text = difference.text.clone();
            let smallest = shrink(&mut lab, difference);
            let (shortest, of_shortest) = (lines(&smallest.played), smallest.text);
            panic!("seed {seed}, {text}\nthe last operations:{last}\nthe fewest: {of_shortest}{shortest}");
        }
    }
    println!("{} operations in {:.1} s:{coverage}", coverage.total(), started.elapsed().as_secs_f32());
    assert_eq!(coverage.missing(&EXPECTED), []);
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn the_rules_are_those_of_the_kernel() {
    let mut lab = Lab::new();
    for (message, expected) in rules::cases() {
        let mut fake = lab.fresh();
        for result in fake.apply(&rules::initial_messages()).iter().chain(&lab.apply(&rules::initial_messages())) {
            assert_eq!(outcome(result), "ok", "{result:?}");
        }
        let by_kernel = lab.apply(&[message]).remove(0);
        assert_eq!(outcome(&by_kernel), expected, "{message:?}");
        assert!(is_same(&fake.apply(&[message])[0], &by_kernel), "{message:?}");
        assert_eq!(lab.difference(&fake), None, "{message:?}");
    }
}

/// What does not change by itself.
fn counts(entry: &RealServerEntry) -> (u32, u32, u64, u64) {
    let stats = entry.stats;
    (entry.active_connections, entry.inactive_connections, stats.connections, stats.incoming_packets)
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test"]
fn what_went_through_a_deleted_real_server_comes_back_with_it() {
    let mut client = client();
    for ip in ["10.96.0.1", "10.1.0.7"] {
        lab::link::add_address("lo", ip).unwrap();
    }
    let (id, address) = (tcp("10.96.0.1:80"), "10.1.0.7:8080".parse().unwrap());
    let given = [Message::AddVirtualServer(round_robin(id)), Message::AddRealServer(id, RealServer::new(address))];
    let mut fake = Ipvs::default();
    for result in fake.apply(&given).into_iter().chain(client.apply(&given).unwrap()) {
        result.unwrap();
    }
    let listener = TcpListener::bind(address).unwrap();
    let _connection = (TcpStream::connect("10.96.0.1:80").unwrap(), listener.accept().unwrap());
    // The kernel brings counters up to date every two seconds.
    let until = Instant::now() + LIMIT;
    let entry = loop {
        let entry = client.real_servers(&id).unwrap()[0];
        if entry.stats.connections == 1 {
            break entry;
        }
        assert!(Instant::now() < until, "{entry:?}");
        thread::sleep(Duration::from_millis(10));
    };
    let traffic = fake.traffic_mut(&id, address).unwrap();
    (traffic.active_connections, traffic.inactive_connections) = (entry.active_connections, entry.inactive_connections);
    traffic.stats = entry.stats;

    for deletion in [Message::DeleteRealServer(id, address), Message::DeleteVirtualServer(id), Message::Flush] {
        let messages = match deletion {
            Message::DeleteRealServer(..) => vec![deletion, given[1]],
            _ => vec![deletion, given[0], given[1]],
        };
        for result in fake.apply(&messages).into_iter().chain(client.apply(&messages).unwrap()) {
            result.unwrap();
        }
        let (by_fake, by_kernel) = (fake.real_servers(&id), client.real_servers(&id).unwrap());
        assert_eq!(by_kernel[0].active_connections, 1, "{deletion:?}");
        assert_eq!(counts(&by_fake[0]), counts(&by_kernel[0]), "{deletion:?}");
    }
}
