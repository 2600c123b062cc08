//! The server over TLS, with a CA of its own that can be replaced.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls_pki_types::PrivateKeyDer;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::{self, ServerConfig};

use crate::{Server, fail_test};

/// A server that listens over TLS.
#[derive(Clone)]
pub struct TlsListener {
    address: SocketAddr,
    identity: Arc<Mutex<Identity>>,
}

/// The CA certificate, and the TLS configuration with a certificate of this CA.
#[derive(Clone)]
struct Identity {
    authority: String,
    config: Arc<ServerConfig>,
}

impl Server {
    /// Listens on a free port of 127.0.0.1, on a thread of its own, until the process ends.
    pub fn listen_over_tls_in_thread(&self) -> io::Result<TlsListener> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
        let identity = Identity::new().unwrap_or_else(|error| fail_test(&error));
        let tls = TlsListener { address: listener.local_addr()?, identity: Arc::new(Mutex::new(identity)) };
        let (server, accepting) = (self.clone(), tls.clone());
        std::thread::spawn(move || {
            runtime.block_on(async {
                while let Ok((connection, _)) = listener.accept().await {
                    let _ = connection.set_nodelay(true);
                    let acceptor = TlsAcceptor::from(accepting.identity().config);
                    let server = server.clone();
                    tokio::spawn(async move {
                        if let Ok(connection) = acceptor.accept(connection).await {
                            server.serve(connection).await;
                        }
                    });
                }
            });
        });
        Ok(tls)
    }
}

impl TlsListener {
    /// From now on new connections get a certificate of a new CA.
    pub fn replace_ca(&self) {
        let identity = Identity::new().unwrap_or_else(|error| fail_test(&error));
        *self.identity.lock().unwrap_or_else(PoisonError::into_inner) = identity;
    }

    /// Writes `ca.crt`, `token` and `kubeconfig` into a directory: the last names the others.
    ///
    /// # Panics
    ///
    /// If a file cannot be written.
    pub fn write_kubeconfig(&self, dir: &Path, token: &str) {
        let (authority, token_file) = (dir.join("ca.crt"), dir.join("token"));
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
            "clusters": [{ "name": "test", "cluster": {
                "server": format!("https://{}", self.address), "certificate-authority": authority,
            } }],
            "users": [{ "name": "test", "user": { "tokenFile": token_file } }],
        });
        let files = [
            (authority, self.identity().authority),
            (token_file, token.to_owned()),
            (dir.join("kubeconfig"), config.to_string()),
        ];
        for (path, content) in files {
            if let Err(error) = std::fs::write(&path, content) {
                fail_test(&format!("cannot write {}: {error}", path.display()));
            }
        }
    }

    fn identity(&self) -> Identity {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Identity {
    fn new() -> Result<Self, String> {
        let text = |error: rcgen::Error| error.to_string();
        let mut params = CertificateParams::new(Vec::new()).map_err(text)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().map_err(text)?).map_err(text)?;
        let key = KeyPair::generate().map_err(text)?;
        let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()])
            .and_then(|params| params.signed_by(&key, &authority))
            .map_err(text)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
            .map_err(|error| error.to_string())?;
        Ok(Self { authority: authority.pem(), config: Arc::new(config) })
    }
}
