//! The methods of [`Client`](crate::Client) on a fake. What only reads does not fail.

use std::net::SocketAddr;

use netlink_batch::Refusal;

use super::Ipvs;
use crate::config::{Info, Timeouts};
use crate::errno::{EINVAL, EOPNOTSUPP};
use crate::error::Error;
use crate::id::VirtualServerId;
use crate::message::Message;
use crate::real_server::{RealServer, RealServerEntry};
use crate::sync_daemon::{SyncDaemon, SyncRole};
use crate::virtual_server::{VirtualServer, VirtualServerEntry};

impl Ipvs {
    /// Carries out messages that change something, in order; a failure does not stop the rest. As with
    /// [`Client::apply`](crate::Client::apply), the lists are none of them.
    pub fn apply(&mut self, messages: &[Message]) -> Vec<Result<(), Error>> {
        messages
            .iter()
            .map(|message| match message {
                // GET_SERVICE that is no dump wants an identity, and the others are dumps only.
                Message::ListVirtualServers => Err(refused(message, EINVAL)),
                Message::ListRealServers(_) | Message::ListSyncDaemons => Err(refused(message, EOPNOTSUPP)),
                _ => self.request(message).map(drop),
            })
            .collect()
    }

    /// The version of IPVS and the size of its connection table.
    pub fn info(&self) -> Info {
        Info::new(super::VERSION, self.kernel.connection_table_size)
    }

    /// The timeouts of idle connections.
    pub fn timeouts(&self) -> Timeouts {
        self.timeouts
    }

    /// Sets the timeouts of idle connections; those that are 0 stay as they are.
    pub fn set_timeouts(&mut self, timeouts: Timeouts) -> Result<(), Error> {
        self.request(&Message::SetTimeouts(timeouts)).map(drop)
    }

    /// All virtual servers, in the order of their identities.
    pub fn virtual_servers(&self) -> Vec<VirtualServerEntry> {
        self.servers.list().collect()
    }

    /// One virtual server; [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) where there is none.
    pub fn virtual_server(&self, id: &VirtualServerId) -> Result<VirtualServerEntry, Error> {
        let found = self.servers.get(&self.kernel, id);
        found.map_err(|errno| refused(&Message::GetVirtualServer(*id), errno))
    }

    /// The real servers of a virtual server, the latest first; none where there is no such virtual server.
    pub fn real_servers(&self, id: &VirtualServerId) -> Vec<RealServerEntry> {
        self.servers.list_real(id).collect()
    }

    /// The synchronization daemons that run, the master first.
    pub fn sync_daemons(&self) -> Vec<SyncDaemon> {
        self.daemons.list().collect()
    }

    /// Makes a virtual server.
    pub fn add_virtual_server(&mut self, server: &VirtualServer) -> Result<(), Error> {
        self.request(&Message::AddVirtualServer(*server)).map(drop)
    }

    /// Changes everything about a virtual server but what identifies it.
    pub fn set_virtual_server(&mut self, server: &VirtualServer) -> Result<(), Error> {
        self.request(&Message::SetVirtualServer(*server)).map(drop)
    }

    /// Deletes a virtual server and its real servers.
    pub fn delete_virtual_server(&mut self, id: &VirtualServerId) -> Result<(), Error> {
        self.request(&Message::DeleteVirtualServer(*id)).map(drop)
    }

    /// Deletes every virtual server.
    pub fn flush(&mut self) {
        self.servers.flush();
    }

    /// Gives a virtual server one more real server.
    pub fn add_real_server(&mut self, id: &VirtualServerId, server: &RealServer) -> Result<(), Error> {
        self.request(&Message::AddRealServer(*id, *server)).map(drop)
    }

    /// Changes everything about a real server but its address and port.
    pub fn set_real_server(&mut self, id: &VirtualServerId, server: &RealServer) -> Result<(), Error> {
        self.request(&Message::SetRealServer(*id, *server)).map(drop)
    }

    /// Takes a real server from a virtual server.
    pub fn delete_real_server(&mut self, id: &VirtualServerId, address: SocketAddr) -> Result<(), Error> {
        self.request(&Message::DeleteRealServer(*id, address)).map(drop)
    }

    /// The counters of a virtual server and its real servers begin anew.
    pub fn zero_virtual_server(&mut self, id: &VirtualServerId) -> Result<(), Error> {
        self.request(&Message::ZeroVirtualServer(*id)).map(drop)
    }

    /// All counters begin anew.
    pub fn zero(&mut self) {
        self.servers.zero_all();
    }

    /// Starts a synchronization daemon.
    pub fn start_sync_daemon(&mut self, daemon: &SyncDaemon) -> Result<(), Error> {
        self.request(&Message::StartSyncDaemon(*daemon)).map(drop)
    }

    /// Stops the synchronization daemon of a role.
    pub fn stop_sync_daemon(&mut self, role: SyncRole) -> Result<(), Error> {
        self.request(&Message::StopSyncDaemon(role)).map(drop)
    }

    fn request(&mut self, message: &Message) -> Result<Vec<Message>, Error> {
        if let Some(fault) = message.fault() {
            return Err(Error::fault(message, fault));
        }
        self.command(message).map_err(|errno| refused(message, errno))
    }
}

fn refused(message: &Message, errno: i32) -> Error {
    Error::new(message, Refusal::new(errno).into())
}
