//! The requests to IPVS: one table, from which each client generates its methods.

/// Calls a macro with the table. Each line is a method, what it returns, and how it runs a message: `execute` one that has no
/// reply, `get` one that has one reply, `list` a dump.
macro_rules! requests {
    ($methods:ident) => {
        $methods! {
            /// The version of IPVS and the size of its connection table (`IPVS_CMD_GET_INFO`).
            info() -> Info = get(Message::GetInfo);

            /// The timeouts of idle connections (`IPVS_CMD_GET_CONFIG`).
            timeouts() -> Timeouts = get(Message::GetTimeouts);

            /// Sets the timeouts of idle connections; those that are 0 stay as they are (`IPVS_CMD_SET_CONFIG`).
            set_timeouts(timeouts: Timeouts) -> () = execute(Message::SetTimeouts(timeouts));

            /// All virtual servers, in the kernel's order, each once (`IPVS_CMD_GET_SERVICE`).
            ///
            /// Some may be missing where others, in any network namespace, delete virtual servers meanwhile: from one
            /// datagram of the list to the next the kernel finds its place by counting, in a table it has for all
            /// namespaces, and does not say when that went wrong. A datagram holds about 90. `all_virtual_servers` has
            /// none missing.
            virtual_servers() -> Vec<VirtualServerEntry> = list(Message::ListVirtualServers);

            /// One virtual server; [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) where there is none
            /// (`IPVS_CMD_GET_SERVICE`).
            virtual_server(id: &VirtualServerId) -> VirtualServerEntry = get(Message::GetVirtualServer(*id));

            /// The real servers of a virtual server, in the kernel's order, each once; none where there is no such virtual
            /// server (`IPVS_CMD_GET_DEST`). Of more than fit a datagram, about 90, some may be missing where others delete
            /// real servers meanwhile. `all_real_servers` has none missing.
            real_servers(id: &VirtualServerId) -> Vec<RealServerEntry> = list(Message::ListRealServers(*id));

            /// Makes a virtual server (`IPVS_CMD_NEW_SERVICE`); [`ErrorKind::Exists`](crate::ErrorKind::Exists) where it
            /// exists, [`ErrorKind::NoScheduler`](crate::ErrorKind::NoScheduler) where the kernel lacks its scheduler or
            /// persistence engine.
            add_virtual_server(server: &VirtualServer) -> () = execute(Message::AddVirtualServer(*server));

            /// Changes everything about a virtual server but what identifies it (`IPVS_CMD_SET_SERVICE`); its real servers
            /// and connections stay.
            set_virtual_server(server: &VirtualServer) -> () = execute(Message::SetVirtualServer(*server));

            /// Deletes a virtual server and its real servers (`IPVS_CMD_DEL_SERVICE`).
            delete_virtual_server(id: &VirtualServerId) -> () = execute(Message::DeleteVirtualServer(*id));

            /// Deletes every virtual server of the namespace (`IPVS_CMD_FLUSH`).
            flush() -> () = execute(Message::Flush);

            /// Gives a virtual server one more real server (`IPVS_CMD_NEW_DEST`);
            /// [`ErrorKind::Exists`](crate::ErrorKind::Exists) where it has that,
            /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) where there is no such virtual server.
            add_real_server(id: &VirtualServerId, server: &RealServer) -> () = execute(Message::AddRealServer(*id, *server));

            /// Changes everything about a real server but its address and port (`IPVS_CMD_SET_DEST`).
            set_real_server(id: &VirtualServerId, server: &RealServer) -> () = execute(Message::SetRealServer(*id, *server));

            /// Takes a real server from a virtual server (`IPVS_CMD_DEL_DEST`). Its connections lead nowhere from then on,
            /// or end at once where the sysctl `expire_nodest_conn` is set: to let them end, set its weight to 0 first.
            delete_real_server(id: &VirtualServerId, address: SocketAddr) -> () = execute(Message::DeleteRealServer(*id, address));

            /// Lets the counters of a virtual server and its real servers begin anew (`IPVS_CMD_ZERO`).
            zero_virtual_server(id: &VirtualServerId) -> () = execute(Message::ZeroVirtualServer(*id));

            /// Lets all counters begin anew, also those of the namespace (`IPVS_CMD_ZERO`).
            zero() -> () = execute(Message::Zero);

            /// The synchronization daemons that run (`IPVS_CMD_GET_DAEMON`), with what the kernel chose for them.
            sync_daemons() -> Vec<SyncDaemon> = list(Message::ListSyncDaemons);

            /// Starts a synchronization daemon (`IPVS_CMD_NEW_DAEMON`); [`ErrorKind::Exists`](crate::ErrorKind::Exists)
            /// where one of its role runs, [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) without its interface. Refused
            /// where a tunnel leads to a real server of the other address family.
            start_sync_daemon(daemon: &SyncDaemon) -> () = execute(Message::StartSyncDaemon(*daemon));

            /// Stops the synchronization daemon of a role (`IPVS_CMD_DEL_DAEMON`). It can take up to two seconds.
            stop_sync_daemon(role: SyncRole) -> () = execute(Message::StopSyncDaemon(role));
        }
    };
}

pub(crate) use requests;
