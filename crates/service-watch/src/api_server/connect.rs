//! The connection to the API server.

use std::net::IpAddr;
use std::path::PathBuf;

use http::{HeaderValue, Uri, header};
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use secrecy::ExposeSecret;

use crate::address::parse_ip;
use crate::error::{Error, chain};
use crate::panics::{caught, point};

/// How to reach an API server, as kube-proxy's flags `--kubeconfig` and `--master` define it.
#[derive(Clone, Debug, Default)]
pub struct Connection {
    /// The kubeconfig to read. Without it and without `master`, the in-cluster configuration is used.
    pub kubeconfig: Option<PathBuf>,
    /// The server's URL, which overrides the kubeconfig's.
    pub master: Option<String>,
    /// The `User-Agent` header, such as `kube-ipvs/0.1.0`; it is in the API server's audit log.
    pub user_agent: Option<String>,
}

/// The CA certificate of the API server in a pod.
const IN_CLUSTER_CA: &str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";

impl Connection {
    /// The IP address of the API server, unless its URL has a host name.
    pub fn server_address(&self) -> Option<IpAddr> {
        let of_url = |server: &str| {
            let server = url(server, "https").ok()?;
            parse_ip(server.host()?.trim_matches(['[', ']']))
        };
        if let Some(master) = &self.master {
            return of_url(master);
        }
        let Some(path) = &self.kubeconfig else { return parse_ip(&std::env::var("KUBERNETES_SERVICE_HOST").ok()?) };
        let kubeconfig = Kubeconfig::read_from(path).ok()?;
        let current = kubeconfig.current_context?;
        let context = kubeconfig.contexts.into_iter().find(|named| named.name == current)?.context?;
        let cluster = kubeconfig.clusters.into_iter().find(|named| named.name == context.cluster)?.cluster?;
        of_url(&cluster.server?)
    }

    /// The files that are read once, when the client is created. If one of them changes, the client must be created
    /// again. Token files are not among them: the client reloads those.
    pub fn files(&self) -> Vec<PathBuf> {
        let Some(path) = &self.kubeconfig else {
            return if self.master.is_none() { vec![IN_CLUSTER_CA.into()] } else { Vec::new() };
        };
        let mut files = vec![path.clone()];
        if let Ok(kubeconfig) = Kubeconfig::read_from(path) {
            let clusters = kubeconfig.clusters.iter().filter_map(|named| named.cluster.as_ref());
            files.extend(clusters.filter_map(|cluster| cluster.certificate_authority.as_ref()).map(PathBuf::from));
            for user in kubeconfig.auth_infos.iter().filter_map(|named| named.auth_info.as_ref()) {
                files.extend([&user.client_certificate, &user.client_key].into_iter().flatten().map(PathBuf::from));
            }
        }
        files
    }
}

/// Creates a client; also returns the server's address.
pub(super) async fn client(connection: &Connection) -> Result<(Client, String), Error> {
    let mut config = match (&connection.kubeconfig, &connection.master) {
        (Some(path), _) => {
            let unusable = |error| Error::Kubeconfig { path: path.clone(), problem: chain(&error) };
            let kubeconfig = Kubeconfig::read_from(path).map_err(unusable)?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(unusable)?
        }
        (None, None) => Config::incluster().map_err(|error| Error::InCluster { problem: chain(&error) })?,
        (None, Some(master)) => Config::new(url(master, "http")?),
    };
    if let Some(master) = &connection.master {
        // As client-go does for an address without scheme.
        let secure = config.root_cert.is_some()
            || config.accept_invalid_certs
            || config.auth_info.client_certificate.is_some()
            || config.auth_info.client_certificate_data.is_some();
        config.cluster_url = url(master, if secure { "https" } else { "http" })?;
    }
    if config.cluster_url.scheme_str() == Some("http") && config.root_cert.is_none() {
        // Otherwise kube loads the system's certificates and fails without any, although HTTP needs none.
        config.root_cert = Some(Vec::new());
    }
    // Reflectors retry with a backoff of their own, and report failures.
    config.default_retry = false;
    if let Some(agent) = connection.user_agent.as_deref().and_then(|agent| HeaderValue::from_str(agent).ok()) {
        config.headers.push((header::USER_AGENT, agent));
    }
    let server = config.cluster_url.to_string().trim_end_matches('/').to_owned();
    let unusable = |problem| Error::Client { server: server.clone(), problem };
    check_credentials(&config.auth_info).map_err(unusable)?;
    // The library panics on a token that is no header, which may also come from a program that the kubeconfig names.
    let client = caught(|| {
        point("connect", &server);
        Client::try_from(config)
    });
    let client = client.map_err(|panic| unusable(panic.to_string()))?.map_err(|error| unusable(chain(&error)))?;
    Ok((client, server))
}

/// Finds what cannot be in the header of a request, without naming the secret itself.
fn check_credentials(user: &AuthInfo) -> Result<(), String> {
    let token = user.token.as_ref().map(ExposeSecret::expose_secret);
    let provided = user.auth_provider.iter().flat_map(|provider| &provider.config);
    let provided = provided.filter(|(key, _)| ["id-token", "access-token"].contains(&key.as_str()));
    let all =
        token.map(|token| ("token", token)).into_iter().chain(provided.map(|(key, token)| (key.as_str(), &**token)));
    for (field, token) in all {
        if HeaderValue::from_str(token).is_err() {
            let end = if token.ends_with(['\n', '\r']) { ", such as the line break at its end" } else { "" };
            return Err(format!("the user's {field} has characters that no token has{end}: remove them"));
        }
    }
    Ok(())
}

fn url(master: &str, scheme: &str) -> Result<Uri, Error> {
    let bad = |problem: String| Error::Master { url: master.to_owned(), problem };
    let full = if master.contains("://") { master.to_owned() } else { format!("{scheme}://{master}") };
    let uri: Uri = full.parse().map_err(|error: http::uri::InvalidUri| bad(error.to_string()))?;
    match (uri.scheme_str(), uri.host()) {
        (Some("http" | "https"), Some(host)) if !host.is_empty() => Ok(uri),
        _ => Err(bad("it needs http or https and a host".into())),
    }
}

/// The host and the port of a server's URL.
pub(super) fn host_and_port(server: &str) -> Option<(String, u16)> {
    let uri: Uri = server.parse().ok()?;
    let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("http") { 80 } else { 443 });
    Some((uri.host()?.trim_matches(['[', ']']).to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::host_and_port;

    #[test]
    fn host_and_port_of_a_url() {
        for (server, host, port) in [
            ("https://control-plane.test:6443", "control-plane.test", 6443),
            ("https://control-plane.test/path", "control-plane.test", 443),
            ("http://192.0.2.1", "192.0.2.1", 80),
            ("https://[fd00::1]:6443", "fd00::1", 6443),
        ] {
            assert_eq!(host_and_port(server), Some((host.to_owned(), port)), "{server}");
        }
        assert_eq!(host_and_port("/"), None);
    }
}
