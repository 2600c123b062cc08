//! Synchronization daemons: `start_sync_thread` and `stop_sync_thread`, without what they send.

use std::net::{IpAddr, Ipv4Addr};
use std::num::{NonZeroU8, NonZeroU16};

use super::kernel::Kernel;
use crate::errno::{EAFNOSUPPORT, EEXIST, EINVAL, ENETUNREACH, ENODEV, ESRCH};
use crate::sync_daemon::{SyncDaemon, SyncRole};

/// `IP_VS_SYNC_GROUP`
const GROUP: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 81);
/// `IP_VS_SYNC_PORT`
const PORT: u16 = 8848;
/// The assumed size of a frame, unless the interface of a backup has larger ones.
const DEFAULT_FRAME: u32 = 1500;
/// The shortest buffer of a backup.
const MIN_BACKUP_BUFFER: u32 = 1024;
const IPV4_AND_UDP_HEADERS: u32 = 20 + 8;
const IPV6_AND_UDP_HEADERS: u32 = 40 + 8;

/// At most one of each role.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Daemons {
    master: Option<SyncDaemon>,
    backup: Option<SyncDaemon>,
}

impl Daemons {
    pub(super) fn list(&self) -> impl Iterator<Item = SyncDaemon> {
        self.master.into_iter().chain(self.backup)
    }

    pub(super) fn is_any_running(&self) -> bool {
        self.list().next().is_some()
    }

    /// `mixed` says whether there is a real server of another family than its virtual server's, which the messages
    /// between daemons have no room for.
    pub(super) fn start(&mut self, daemon: &SyncDaemon, kernel: &Kernel, mixed: bool) -> Result<(), i32> {
        let group = daemon.group.unwrap_or(GROUP.into());
        if !group.is_multicast() || mixed {
            return Err(EINVAL);
        }
        let interface = kernel.interfaces.get(&daemon.interface).ok_or(ENODEV)?;
        let slot = self.slot(daemon.role);
        if slot.is_some() {
            return Err(EEXIST);
        }
        // make_send_sock connects, for which it takes a route; make_receive_sock joins the group only.
        if group.is_ipv6() {
            if !kernel.ipv6 {
                return Err(EAFNOSUPPORT);
            }
            if daemon.role == SyncRole::Master && !interface.routes_ipv6_multicast {
                return Err(ENETUNREACH);
            }
        }
        *slot = Some(SyncDaemon {
            max_length: Some(max_length(daemon, group, interface.mtu)),
            group: Some(group),
            port: daemon.port.or(NonZeroU16::new(PORT)),
            ttl: daemon.ttl.or(Some(NonZeroU8::MIN)),
            ..*daemon
        });
        Ok(())
    }

    pub(super) fn stop(&mut self, role: SyncRole) -> Result<(), i32> {
        self.slot(role).take().map(drop).ok_or(ESRCH)
    }

    fn slot(&mut self, role: SyncRole) -> &mut Option<SyncDaemon> {
        match role {
            SyncRole::Master => &mut self.master,
            SyncRole::Backup => &mut self.backup,
        }
    }
}

fn max_length(daemon: &SyncDaemon, group: IpAddr, mtu: u32) -> NonZeroU16 {
    let longest = u32::from(u16::MAX);
    let headers = if group.is_ipv4() { IPV4_AND_UDP_HEADERS } else { IPV6_AND_UDP_HEADERS };
    let (frame, shortest) = match daemon.role {
        SyncRole::Master => (DEFAULT_FRAME, 1),
        SyncRole::Backup => (mtu.clamp(DEFAULT_FRAME, longest), MIN_BACKUP_BUFFER),
    };
    let length = match daemon.max_length {
        Some(asked) => u32::from(asked.get()).clamp(shortest, longest - headers),
        None => frame - headers,
    };
    // Between 1 and 65507, as clamped.
    u16::try_from(length).ok().and_then(NonZeroU16::new).unwrap_or(NonZeroU16::MAX)
}
