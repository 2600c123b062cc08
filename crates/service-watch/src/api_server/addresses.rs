//! Where this agent reaches the API server: the addresses of the name in the server's URL, and the peers of the connections.

use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::Extensions;
use hyper_util::client::legacy::connect::HttpInfo;
use tokio::net::lookup_host;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tracing::debug;

use crate::api_server::reflector::period;

/// The period between two look-ups of the server's name. A connection that stays open needs none.
const LOOKUP_PERIOD: Duration = Duration::from_secs(30);
/// How many addresses are remembered. A name may have many, and have others at each look-up.
const MAX_ADDRESSES: usize = 64;

/// The most recent addresses of the API server, the latest first. Clones share them.
///
/// An address stays after the name has lost it, since it may come back at any time.
#[derive(Clone, Debug)]
pub(super) struct ServerAddresses(Arc<watch::Sender<VecDeque<SocketAddr>>>);

impl Default for ServerAddresses {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(VecDeque::new())))
    }
}

impl ServerAddresses {
    /// Records the peer of the connection that had a response.
    pub(super) fn record_peer(&self, response: &Extensions) {
        if let Some(connection) = response.get::<HttpInfo>() {
            self.record([connection.remote_addr()]);
        }
    }

    /// Looks up a name again and again; never ends.
    pub(super) async fn follow_name(self, host: String, port: u16) {
        let mut interval = interval(period(LOOKUP_PERIOD));
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            match lookup_host((host.as_str(), port)).await {
                Ok(addresses) => self.record(addresses),
                // Requests fail too, and say so; through a proxy, only the proxy must be able to resolve the name.
                Err(error) => debug!("cannot resolve the name of the API server: {error}"),
            }
        }
    }

    /// Notified of each new address.
    pub(super) fn subscribe(&self) -> watch::Receiver<VecDeque<SocketAddr>> {
        self.0.subscribe()
    }

    fn record(&self, addresses: impl IntoIterator<Item = SocketAddr>) {
        let addresses: BTreeSet<SocketAddr> = addresses
            .into_iter()
            .map(|address| SocketAddr::new(address.ip().to_canonical(), address.port()))
            // No Service can have these.
            .filter(|address| !is_of_this_host(address.ip()))
            .take(MAX_ADDRESSES)
            .collect();
        self.0.send_if_modified(|known| {
            let has_new = addresses.iter().any(|address| !known.contains(address));
            known.retain(|address| !addresses.contains(address));
            for address in &addresses {
                known.push_front(*address);
            }
            known.truncate(MAX_ADDRESSES);
            has_new
        });
    }
}

fn is_of_this_host(address: IpAddr) -> bool {
    address.is_loopback() || address.is_unspecified()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(addresses: &ServerAddresses) -> Vec<String> {
        addresses.0.borrow().iter().map(ToString::to_string).collect()
    }

    fn record(addresses: &ServerAddresses, texts: &[&str]) {
        addresses.record(texts.iter().map(|text| text.parse().unwrap()));
    }

    #[test]
    fn addresses_stay_when_the_name_has_others() {
        let addresses = ServerAddresses::default();
        let mut changes = addresses.subscribe();
        record(&addresses, &["192.0.2.1:6443", "127.0.0.1:6443", "[::1]:6443", "[::ffff:192.0.2.2]:6443"]);
        assert_eq!(known(&addresses), ["192.0.2.2:6443", "192.0.2.1:6443"]);
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        record(&addresses, &["192.0.2.1:6443"]);
        assert!(!changes.has_changed().unwrap(), "only the order has changed");
        record(&addresses, &["[fd00::1]:6443"]);
        assert_eq!(known(&addresses), ["[fd00::1]:6443", "192.0.2.1:6443", "192.0.2.2:6443"]);
    }

    #[test]
    fn the_number_of_addresses_is_limited() {
        let addresses = ServerAddresses::default();
        for number in 0..1000 {
            record(&addresses, &[&format!("192.0.{}.{}:6443", number / 250, number % 250)]);
        }
        assert_eq!(known(&addresses).len(), MAX_ADDRESSES);
        assert_eq!(known(&addresses)[0], "192.0.3.249:6443");
    }
}
