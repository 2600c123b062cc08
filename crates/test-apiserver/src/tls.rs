//! The server over TLS, with a CA of its own that can be replaced.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use serde_json::json;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::client::danger::HandshakeSignatureValid;
use tokio_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio_rustls::rustls::{self, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};

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
    certificate: String,
    config: Arc<ServerConfig>,
}

/// The certificate of a server, which is for 127.0.0.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerCertificate {
    /// Of an authority that signed it.
    Issued,
    /// As `Issued`; connections need a client certificate, of any kind.
    IssuedAndAsking,
    /// Signed by itself, and of an authority.
    SelfSignedAuthority,
    /// Signed by itself, and not of an authority.
    SelfSigned,
}

impl Server {
    /// Listens on a free port of 127.0.0.1, on a thread of its own, until the process ends.
    pub fn listen_over_tls_in_thread(&self) -> io::Result<TlsListener> {
        self.listen_with_certificate_in_thread(ServerCertificate::Issued)
    }

    /// As [`listen_over_tls_in_thread`](Self::listen_over_tls_in_thread), with a certificate of that kind.
    pub fn listen_with_certificate_in_thread(&self, kind: ServerCertificate) -> io::Result<TlsListener> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // Not by the runtime: this may be called on another.
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let identity = Identity::new(kind).unwrap_or_else(|error| fail_test(&error));
        let tls = TlsListener { address: listener.local_addr()?, identity: Arc::new(Mutex::new(identity)) };
        let (server, accepting) = (self.clone(), tls.clone());
        std::thread::spawn(move || {
            runtime.block_on(async {
                let Ok(listener) = TcpListener::from_std(listener) else { return };
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
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The certificate of the authority, or of the server if it signed that itself, as PEM.
    pub fn authority(&self) -> String {
        self.identity().authority
    }

    /// The certificate of the server, as PEM.
    pub fn certificate(&self) -> String {
        self.identity().certificate
    }

    /// From now on new connections get a certificate of a new CA.
    pub fn replace_ca(&self) {
        let identity = Identity::new(ServerCertificate::Issued).unwrap_or_else(|error| fail_test(&error));
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
    fn new(kind: ServerCertificate) -> Result<Self, String> {
        let text = |error: rcgen::Error| error.to_string();
        let mut params = CertificateParams::new(Vec::new()).map_err(text)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().map_err(text)?).map_err(text)?;
        let key = KeyPair::generate().map_err(text)?;
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).map_err(text)?;
        let certificate = match kind {
            ServerCertificate::Issued | ServerCertificate::IssuedAndAsking => params.signed_by(&key, &authority),
            ServerCertificate::SelfSigned => params.self_signed(&key),
            ServerCertificate::SelfSignedAuthority => {
                params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
                params.self_signed(&key)
            }
        };
        let certificate = certificate.map_err(text)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        let builder = match kind {
            ServerCertificate::IssuedAndAsking => builder.with_client_cert_verifier(Arc::new(AnyClient)),
            _ => builder.with_no_client_auth(),
        };
        let config = builder
            .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
            .map_err(|error| error.to_string())?;
        let pem = certificate.pem();
        let is_issued = matches!(kind, ServerCertificate::Issued | ServerCertificate::IssuedAndAsking);
        let authority = if is_issued { authority.pem() } else { pem.clone() };
        Ok(Self { authority, certificate: pem, config: Arc::new(config) })
    }
}

/// Takes any client certificate, such as those that rustls cannot parse, and none is an error.
#[derive(Debug)]
struct AnyClient;

impl ClientCertVerifier for AnyClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
