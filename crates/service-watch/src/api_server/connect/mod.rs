//! The connection to the API server: a client for what flags and the kubeconfig describe.
//!
//! The client library has only the requests: its own reading of kubeconfigs, credentials and certificates refuses what
//! client-go takes, and panics on some of it.
//!
//! * `kubeconfig`: the file
//! * `server_url`, `proxy`: where to connect to
//! * `credentials`, `exec`, `tls`: whom to believe, and how to be believed

mod credentials;
mod exec;
mod kubeconfig;
mod proxy;
mod server_url;
mod tls;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http::uri::PathAndQuery;
use http::{HeaderValue, Request, StatusCode, Uri, header};
use hyper_rustls::{
    DefaultServerNameResolver, FixedServerNameResolver, HttpsConnector, MaybeHttpsStream, ResolveServerName,
};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::{SocksV5, Tunnel};
use hyper_util::rt::{TokioExecutor, TokioIo};
use kube::Client;
use kube::client::Body;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tower::util::BoxCloneSyncService;
use tower::{BoxError, Service, ServiceExt as _};

use self::credentials::Credentials;
use self::kubeconfig::{Cluster, Selection, User};
use self::server_url::ServerUrl;
pub(super) use self::server_url::host_and_port;
use self::tls::{ClientCertificate, Trust, client_config};
use crate::address::parse_ip;
use crate::error::Error;
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

/// The files of a service account in a pod.
const IN_CLUSTER_CA: &str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";
const IN_CLUSTER_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the peer may accept nothing of what is written.
const WRITE_TIMEOUT: Duration = Duration::from_secs(295);

impl Connection {
    /// The IP address of the API server, unless its URL has a host name.
    pub fn server_address(&self) -> Option<IpAddr> {
        let server = match (&self.master, &self.kubeconfig) {
            (Some(master), _) => master.clone(),
            (None, Some(path)) => kubeconfig::read(path).ok()?.cluster.server,
            (None, None) => return parse_ip(&std::env::var("KUBERNETES_SERVICE_HOST").ok()?),
        };
        let server = server_url::parse(&server, true).ok()?;
        parse_ip(server.uri.host()?.trim_matches(['[', ']']))
    }

    /// The files that are read once, when the client is created. If one of them changes, the client must be created
    /// again. Token files are not among them: the client reads those for each request.
    pub fn files(&self) -> Vec<PathBuf> {
        let Some(path) = &self.kubeconfig else {
            return if self.master.is_none() { vec![IN_CLUSTER_CA.into()] } else { Vec::new() };
        };
        let mut files = vec![path.clone()];
        if let Ok(Selection { cluster, user }) = kubeconfig::read(path) {
            let named = [cluster.certificate_authority, user.client_certificate, user.client_key];
            files.extend(named.into_iter().filter(|file| !file.as_os_str().is_empty()));
        }
        files
    }
}

/// What a client is made of.
struct Target {
    server: Uri,
    proxy: Option<Uri>,
    tls: ClientConfig,
    server_name: Option<ServerName<'static>>,
    credentials: Credentials,
}

/// Creates a client; also returns the server's address.
///
/// If `check` is set, a program for credentials is run at once, so that its failure is an error here.
pub(super) async fn client(connection: &Connection, check: bool) -> Result<(Client, String), Error> {
    let target = target(connection)?;
    let server = target.server.to_string().trim_end_matches('/').to_owned();
    let unusable = |problem| Error::Client { server: server.clone(), problem };
    if check {
        target.credentials.headers().await.map_err(unusable)?;
    }
    let agent = connection.user_agent.as_deref().and_then(|agent| HeaderValue::from_str(agent).ok());
    let client = caught(|| {
        point("connect", &server);
        build(target, agent)
    });
    Ok((client.map_err(|panic| unusable(panic.to_string()))?, server))
}

fn target(connection: &Connection) -> Result<Target, Error> {
    let master = connection.master.as_deref().filter(|master| !master.trim().is_empty());
    let Some(path) = &connection.kubeconfig else {
        return match master {
            Some(master) => of_selection(Selection::default(), Some(master), Path::new("")),
            None => in_cluster().map_err(|problem| Error::InCluster { problem }),
        };
    };
    let selection = kubeconfig::read(path).map_err(|problem| Error::Kubeconfig { path: path.clone(), problem })?;
    of_selection(selection, master, path)
}

fn of_selection(selection: Selection, master: Option<&str>, path: &Path) -> Result<Target, Error> {
    let Selection { mut cluster, user } = selection;
    let unusable = |problem| Error::Kubeconfig { path: path.to_owned(), problem };
    // As client-go decides for an address without a scheme.
    let has = |data: &str, file: &Path| !data.is_empty() || !file.as_os_str().is_empty();
    let secure = cluster.insecure_skip_tls_verify
        || has(&cluster.certificate_authority_data, &cluster.certificate_authority)
        || has(&user.client_certificate_data, &user.client_certificate);
    if let Some(master) = master {
        master.clone_into(&mut cluster.server);
    }
    if cluster.server.is_empty() {
        return Err(unusable("it has no current-context, or that names no server".to_owned()));
    }
    let url = server_url::parse(&cluster.server, secure).map_err(|problem| match master {
        Some(master) => Error::Master { url: master.to_owned(), problem },
        None => unusable(format!(
            "the server {:?} is no URL: {problem}; give one such as https://192.0.2.1:6443",
            cluster.server
        )),
    })?;
    let server = url.uri.to_string().trim_end_matches('/').to_owned();
    of_cluster(&cluster, &user, url).map_err(|problem| Error::Client { server, problem })
}

fn of_cluster(cluster: &Cluster, user: &User, url: ServerUrl) -> Result<Target, String> {
    let ServerUrl { uri: server, authorization } = url;
    let proxy = proxy::proxy_for(&server, &cluster.proxy_url, environment)?;
    let certificate = ClientCertificate::default();
    if let Some(identity) = user.identity()? {
        certificate.set(&identity.certificate, &identity.key)?;
    }
    let is_https = |uri: &Uri| uri.scheme_str() == Some("https");
    let tls = if is_https(&server) || proxy.as_ref().is_some_and(is_https) {
        let trust = match (cluster.insecure_skip_tls_verify, cluster.authority()?) {
            (true, Some(_)) => {
                return Err("the cluster has a certificate-authority and insecure-skip-tls-verify: remove the latter"
                    .to_owned());
            }
            (true, None) => Trust::Anybody,
            (false, Some(pem)) => Trust::Authorities(pem),
            (false, None) => Trust::System,
        };
        client_config(trust, certificate.clone())?
    } else {
        // It is never used, and needs no authorities, which a host may lack.
        client_config(Trust::Anybody, certificate.clone())?
    };
    let server_name = match cluster.tls_server_name.as_str() {
        "" => None,
        name => Some(ServerName::try_from(name.to_owned()).map_err(|_| {
            format!("tls-server-name {name:?} is neither a DNS name nor an address: give a name that the server's certificate has")
        })?),
    };
    let credentials = Credentials::new(cluster, user, authorization, &certificate)?;
    Ok(Target { server, proxy, tls, server_name, credentials })
}

/// The API server of the cluster that this pod runs in.
fn in_cluster() -> Result<Target, String> {
    let variable = |name: &str| {
        environment(name).filter(|value| !value.is_empty()).ok_or_else(|| format!("the variable {name} is not set"))
    };
    let (host, port) = (variable("KUBERNETES_SERVICE_HOST")?, variable("KUBERNETES_SERVICE_PORT")?);
    let host = if host.contains(':') { format!("[{}]", host.trim_matches(['[', ']'])) } else { host };
    let ServerUrl { uri: server, .. } = server_url::parse(&format!("https://{host}:{port}"), true)?;
    let credentials = Credentials::of_token_file(Path::new(IN_CLUSTER_TOKEN))?;
    let authority = std::fs::read(IN_CLUSTER_CA).map_err(|error| format!("cannot read {IN_CLUSTER_CA}: {error}"))?;
    let tls = client_config(Trust::Authorities(authority), ClientCertificate::default())?;
    let proxy = proxy::proxy_for(&server, "", environment)?;
    Ok(Target { server, proxy, tls, server_name: None, credentials })
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// A connection, plain or in TLS to a proxy.
type Stream = MaybeHttpsStream<TokioIo<TcpStream>>;
type Connector = BoxCloneSyncService<Uri, Stream, BoxError>;

fn build(target: Target, user_agent: Option<HeaderValue>) -> Client {
    let Target { server, proxy, tls, server_name, credentials } = target;
    let tls = Arc::new(tls);
    let names: Arc<dyn ResolveServerName + Send + Sync> = match server_name {
        Some(name) => Arc::new(FixedServerNameResolver::new(name)),
        None => Arc::new(DefaultServerNameResolver::default()),
    };
    let connector = HttpsConnector::new(connector(proxy, &tls), tls, false, names);
    let mut connector = TimeoutConnector::new(connector);
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector.set_write_timeout(Some(WRITE_TIMEOUT));
    let http = legacy::Client::builder(TokioExecutor::new()).build::<_, Body>(connector);
    let shared = Arc::new((server, user_agent, credentials));
    let service = tower::service_fn(move |mut request: Request<Body>| {
        let (http, shared) = (http.clone(), shared.clone());
        async move {
            let (server, user_agent, credentials) = &*shared;
            *request.uri_mut() = join(server, request.uri())?;
            let headers = request.headers_mut();
            headers.extend(user_agent.iter().map(|agent| (header::USER_AGENT, agent.clone())));
            // The field `as-groups` gives a header for each group.
            for (name, value) in credentials.headers().await? {
                headers.append(name, value);
            }
            let response = http.request(request).await.map_err(|error| tls::with_remedy(Box::new(error)))?;
            if response.status() == StatusCode::UNAUTHORIZED {
                credentials.refused();
            }
            Ok::<_, BoxError>(response)
        }
    });
    Client::new(service, "default")
}

/// The URL of a request, which has only a path, on a server, which may have one too.
fn join(server: &Uri, request: &Uri) -> Result<Uri, http::Error> {
    let path = request.path_and_query().map_or("/", PathAndQuery::as_str);
    let mut parts = server.clone().into_parts();
    let prefix = server.path().trim_end_matches('/');
    parts.path_and_query = Some(format!("{prefix}{path}").parse()?);
    Ok(Uri::from_parts(parts)?)
}

/// Connects to the server, or to it through a proxy.
fn connector(proxy: Option<Uri>, tls: &Arc<ClientConfig>) -> Connector {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    let Some(proxy) = proxy else { return boxed(tcp.map_response(Stream::Http)) };
    let user =
        proxy.authority().and_then(|authority| authority.as_str().rsplit_once('@')).map(|(user, _)| user.to_owned());
    match proxy.scheme_str() {
        Some("socks5" | "socks5h") => {
            let decode = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
            let mut socks = SocksV5::new(proxy, tcp);
            if let Some(user) = user {
                let (user, password) = user.split_once(':').unwrap_or((&user, ""));
                socks = socks.with_auth(decode(user), decode(password));
            }
            boxed(socks.map_response(Stream::Http))
        }
        Some("https") => boxed(tunnel(proxy, user.as_deref(), HttpsConnector::from((tcp, tls.clone())))),
        _ => boxed(tunnel(proxy, user.as_deref(), tcp).map_response(Stream::Http)),
    }
}

fn tunnel<C>(proxy: Uri, user: Option<&str>, connector: C) -> Tunnel<C> {
    let tunnel = Tunnel::new(proxy, connector);
    match user.and_then(server_url::basic_of_url) {
        Some(authorization) => tunnel.with_auth(authorization),
        None => tunnel,
    }
}

fn boxed<S>(service: S) -> Connector
where
    S: Service<Uri, Response = Stream> + Clone + Send + Sync + 'static,
    S::Error: Into<BoxError> + 'static,
    S::Future: Send + 'static,
{
    BoxCloneSyncService::new(service.map_err(Into::into))
}
