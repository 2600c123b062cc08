//! Network namespaces for tests inside the lab: each test builds a network of its own, and many run at once.
//!
//! IPVS, the packet filter, connection tracking, addresses and `net.*` settings are per network namespace, and a
//! namespace belongs to a *thread*: a new one affects the calling thread, the threads and processes it starts
//! afterwards, and the sockets it opens; nothing else in the process. Two things to know: a runtime's worker threads
//! that existed before stay where they were, so create the namespace first; and `/proc/net` is that of the process's
//! main thread, so read `/proc/thread-self/net` instead. (`/proc/sys/net` is that of the reading thread.)

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::process::Command;

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::error::{Context, Error, Result};
use crate::{link, packages};

/// Where `ip netns` keeps the namespaces that have names.
pub(crate) const NAMED: &str = "/run/netns";

/// Moves the calling thread into a fresh network namespace that holds nothing but a loopback device, which is up.
pub fn isolate() -> Result<()> {
    unshare(UnshareFlags::NEWNET)?;
    loopback_up()
}

/// A network namespace, for topologies of several. It goes away with this value and what still runs in it.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    name: Option<String>,
}

/// One end of a cable between two namespaces.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// Where it is plugged in.
    pub namespace: &'a Namespace,
    /// The name of the device there.
    pub device: &'a str,
    /// Its addresses, with prefix length.
    pub addresses: &'a [&'a str],
}

impl Namespace {
    /// A fresh namespace without a name: any number of tests can have them at the same time.
    pub fn new() -> Result<Self> {
        on_own_thread(|| {
            isolate()?;
            Self::own()
        })
    }

    /// The namespace of the calling thread, to be connected with others.
    pub fn own() -> Result<Self> {
        Ok(Self { file: File::open(OWN).context("open", OWN)?, name: None })
    }

    /// A fresh namespace that `ip netns exec NAME` finds, for people who look around. The name must not be in use.
    pub fn named(name: &str) -> Result<Self> {
        let path = named_path(name);
        fs::create_dir_all(NAMED).context("create", NAMED)?;
        File::create_new(&path).context("create the network namespace", path.display())?;
        let made = on_own_thread(|| {
            isolate()?;
            mount_bind(OWN, &path).context("mount", path.display())?;
            File::open(OWN).context("open", OWN)
        });
        if made.is_err() {
            let _ = fs::remove_file(&path);
        }
        Ok(Self { file: made?, name: Some(name.into()) })
    }

    /// Runs a closure on a thread inside the namespace. Processes and threads it starts stay inside.
    pub fn run<T: Send>(&self, action: impl FnOnce() -> T + Send) -> Result<T> {
        on_own_thread(|| {
            move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))
                .context("enter", "a network namespace")?;
            Ok(action())
        })
    }

    /// Runs a program to its end inside the namespace and returns its output; one that fails is an error. The words of
    /// `command` are separated by white space: `namespace.exec("ip link set eth0 up")`.
    pub fn exec(&self, command: &str) -> Result<String> {
        let mut words = command.split_whitespace();
        let program = words.next().ok_or_else(|| Error::Usage("an empty command".into()))?;
        self.run(|| packages::checked(Command::new(program).args(words)))?
    }

    /// Connects two namespaces with a pair of devices that are up and have addresses.
    pub fn connect(a: End<'_>, b: End<'_>) -> Result<()> {
        a.namespace.run(|| link::add_veth(a.device, b.device, Some(&b.namespace.file)))??;
        for end in [a, b] {
            end.namespace.run(|| {
                end.addresses.iter().try_for_each(|address| link::add_address(end.device, address))?;
                link::set_up(end.device)
            })??;
        }
        Ok(())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // Whoever removed it before us did what we want.
            let path = named_path(name);
            let _ = unmount(&path, UnmountFlags::DETACH);
            let _ = fs::remove_file(path);
        }
    }
}

/// The network namespace of the calling thread.
const OWN: &str = "/proc/thread-self/ns/net";

fn named_path(name: &str) -> PathBuf {
    [NAMED, name].iter().collect()
}

/// Runs a closure on a new thread, so that the namespaces it enters are not ours.
pub(crate) fn on_own_thread<T: Send>(action: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, action).context("start", "a thread")?;
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// Gives the calling thread namespaces of its own.
#[expect(unsafe_code, reason = "unshare is unsafe because of a flag that is never passed here")]
pub(crate) fn unshare(flags: UnshareFlags) -> Result<()> {
    debug_assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: only CLONE_FILES, which would give the thread file descriptors of its own, can break Rust's guarantees;
    // all callers pass flags of network and mount namespaces alone.
    unsafe { rustix::thread::unshare_unsafe(flags) }.context("create", "a namespace")
}

/// Brings up the loopback device of the calling thread's namespace.
pub(crate) fn loopback_up() -> Result<()> {
    const REQUEST_AND_ACK: u16 = 0x1 | 0x4;
    const NEW_LINK: u16 = 16;
    const UP: u32 = 1;
    // In every namespace the loopback device is the first.
    const LOOPBACK: u32 = 1;
    let mut request = Vec::with_capacity(32);
    request.extend(32_u32.to_ne_bytes());
    request.extend(NEW_LINK.to_ne_bytes());
    request.extend(REQUEST_AND_ACK.to_ne_bytes());
    request.extend([0; 8]); // sequence number and port
    request.extend([0; 4]); // family and type
    request.extend([LOOPBACK, UP, UP].map(u32::to_ne_bytes).concat());

    let answer = || -> rustix::io::Result<i32> {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        rustix::net::sendto(&socket, &request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        let mut reply = [0; 256];
        let (_, length) = rustix::net::recv(&socket, &mut reply[..], RecvFlags::empty())?;
        // After the 16 bytes of the header an acknowledgement has the error, negated.
        let code = reply[..length].get(16..20).ok_or(Errno::BADMSG)?;
        Ok(i32::from_ne_bytes([code[0], code[1], code[2], code[3]]))
    };
    let code = answer().and_then(|code| if code == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(-code)) });
    code.context("bring up", "the loopback device")
}
