//! Finding the API server.

use std::net::IpAddr;
use std::path::PathBuf;

use http::{HeaderValue, Uri, header};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use crate::address::parse_ip;
use crate::error::{Error, chain};

/// How to reach an API server: what kube-proxy's flags `--kubeconfig` and `--master` say.
#[derive(Clone, Debug, Default)]
pub struct Connection {
    /// The kubeconfig to read. Without it and without `master`, the service account of the pod this runs in.
    pub kubeconfig: Option<PathBuf>,
    /// The server's URL, in place of the kubeconfig's.
    pub master: Option<String>,
    /// What the API server's audit log calls this program, as `kube-ipvs/0.1.0`.
    pub user_agent: Option<String>,
}

/// Where a pod has the certificate of its API server's authority.
const IN_CLUSTER_AUTHORITY: &str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";

impl Connection {
    /// The address of the API server, where it is known by its address and not by a name.
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

    /// The files that are read once, when a connection is made: where one of them changes, it is to be made anew. Tokens
    /// are not among them, they are read again and again.
    pub fn files(&self) -> Vec<PathBuf> {
        let Some(path) = &self.kubeconfig else {
            return if self.master.is_none() { vec![IN_CLUSTER_AUTHORITY.into()] } else { Vec::new() };
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

/// A client, and the server's address.
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
        // As client-go takes an address without scheme.
        let secure = config.root_cert.is_some()
            || config.accept_invalid_certs
            || config.auth_info.client_certificate.is_some()
            || config.auth_info.client_certificate_data.is_some();
        config.cluster_url = url(master, if secure { "https" } else { "http" })?;
    }
    if config.cluster_url.scheme_str() == Some("http") && config.root_cert.is_none() {
        // Otherwise the system's certificates are looked for, and missing ones are an error, although none is needed.
        config.root_cert = Some(Vec::new());
    }
    // Feeds pause and try again themselves, and say so.
    config.default_retry = false;
    if let Some(agent) = connection.user_agent.as_deref().and_then(|agent| HeaderValue::from_str(agent).ok()) {
        config.headers.push((header::USER_AGENT, agent));
    }
    let server = config.cluster_url.to_string().trim_end_matches('/').to_owned();
    let client =
        Client::try_from(config).map_err(|error| Error::Client { server: server.clone(), problem: chain(&error) })?;
    Ok((client, server))
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
