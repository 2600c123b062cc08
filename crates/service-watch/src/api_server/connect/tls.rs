//! TLS to the API server: whom to believe, and the client's own certificate.
//!
//! It takes what Go's crypto/tls takes where rustls would not: a server's certificate that is itself in the list of
//! authorities, and client certificates of X.509 version 1.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, InconsistentKeys, RootCertStore,
    SignatureScheme,
};

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The client's certificate with its key. Clones share it; it may be replaced while there are connections.
#[derive(Clone, Debug, Default)]
pub(super) struct ClientCertificate(Arc<RwLock<Option<Arc<CertifiedKey>>>>);

impl ClientCertificate {
    /// Replaces it by what two texts in PEM have. They may have other things too.
    pub(super) fn set(&self, certificate: &[u8], key: &[u8]) -> Result<(), String> {
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificate).collect();
        let chain = chain.map_err(|error| format!("the client certificate is not valid PEM: {error}"))?;
        if chain.is_empty() {
            return Err("the client certificate has no block BEGIN CERTIFICATE: give it as PEM".to_owned());
        }
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| {
            format!(
                "the client key is not a private key in PEM without a password ({error}): `openssl pkey` converts it"
            )
        })?;
        let key = provider().key_provider.load_private_key(key).map_err(|_| {
            "the client key is of a kind that is not supported: have a certificate issued for a key of RSA with 2048 to 4096 \
             bits, ECDSA with P-256 or P-384 (not P-521), or Ed25519"
                .to_owned()
        })?;
        let certified = CertifiedKey::new(chain, key);
        // Other errors say that the certificate cannot be parsed, such as version 1: the server decides about that.
        if let Err(rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) = certified.keys_match() {
            return Err(
                "the client certificate is not for the client key: give the two that belong together".to_owned()
            );
        }
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(certified));
        Ok(())
    }
}

impl ResolvesClientCert for ClientCertificate {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Whom to believe.
pub(super) enum Trust {
    /// The authorities of a text in PEM.
    Authorities(Vec<u8>),
    /// Those of the system.
    System,
    /// Anybody.
    Anybody,
}

/// The configuration of TLS for connections to the API server, and to a proxy before it.
pub(super) fn client_config(trust: Trust, certificate: ClientCertificate) -> Result<ClientConfig, String> {
    let provider = provider();
    let verifier: Arc<dyn ServerCertVerifier> = match trust {
        Trust::Anybody => Arc::new(AnyServer),
        Trust::Authorities(pem) => Arc::new(Verifier::new(authorities(&pem)?, &provider)?),
        Trust::System => Arc::new(Verifier::new(rustls_native_certs::load_native_certs().certs, &provider)?),
    };
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| error.to_string())?.dangerous().with_custom_certificate_verifier(verifier);
    Ok(builder.with_client_cert_resolver(Arc::new(certificate)))
}

/// The certificates of a text in PEM. What is none of them is passed over, as in Go.
fn authorities(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem).filter_map(Result::ok).collect();
    if found.is_empty() {
        return Err(
            "certificate-authority has no block BEGIN CERTIFICATE: give the certificate of the API server's authority \
                    as PEM"
                .to_owned(),
        );
    }
    Ok(found)
}

/// Believes certificates of the authorities, and the certificates that are in their list.
#[derive(Debug)]
struct Verifier {
    web_pki: Arc<WebPkiServerVerifier>,
    listed: Vec<CertificateDer<'static>>,
}

impl Verifier {
    fn new(listed: Vec<CertificateDer<'static>>, provider: &Arc<CryptoProvider>) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(listed.iter().cloned());
        let web_pki = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
        let web_pki = web_pki.map_err(|_| {
            "there is no usable certificate of an authority to believe: set certificate-authority to the one that issued the API \
             server's certificate"
                .to_owned()
        })?;
        Ok(Self { web_pki, listed })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let result = self.web_pki.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        // webpki looks at the period of validity before it gives one of these.
        let not_issued = match &result {
            Err(rustls::Error::InvalidCertificate(problem)) => match problem {
                CertificateError::UnknownIssuer | CertificateError::BadSignature => true,
                CertificateError::Other(other) => other.0.to_string().contains("CaUsedAsEndEntity"),
                _ => false,
            },
            _ => false,
        };
        if not_issued && self.listed.iter().any(|listed| listed == end_entity) {
            verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
            return Ok(ServerCertVerified::assertion());
        }
        result
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.web_pki.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.web_pki.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.web_pki.supported_verify_schemes()
    }
}

/// `insecure-skip-tls-verify`: believes anybody.
#[derive(Debug)]
struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
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
        vec![
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::ECDSA_NISTP384_SHA384,
            SignatureScheme::ECDSA_NISTP521_SHA512,
            SignatureScheme::ED25519,
            SignatureScheme::RSA_PSS_SHA256,
            SignatureScheme::RSA_PSS_SHA384,
            SignatureScheme::RSA_PSS_SHA512,
            SignatureScheme::RSA_PKCS1_SHA256,
            SignatureScheme::RSA_PKCS1_SHA384,
            SignatureScheme::RSA_PKCS1_SHA512,
        ]
    }
}

/// A connection that TLS refused, with what to do about it.
#[derive(Debug)]
pub(super) struct Refused {
    remedy: &'static str,
    cause: Box<dyn StdError + Send + Sync>,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The remedy comes before the cause, which is long.
        f.write_str(self.remedy)
    }
}

impl StdError for Refused {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.cause)
    }
}

/// Adds the remedy to an error of TLS.
pub(super) fn with_remedy(error: Box<dyn StdError + Send + Sync>) -> Box<dyn StdError + Send + Sync> {
    match tls_error(&*error).and_then(remedy) {
        Some(remedy) => Box::new(Refused { remedy, cause: error }),
        None => error,
    }
}

fn tls_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a rustls::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        // The source of such an error is that of the one in it.
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if let Some(found) = inner.and_then(|inner| tls_error(inner)) {
            return Some(found);
        }
        cause = error.source();
    }
    None
}

fn remedy(error: &rustls::Error) -> Option<&'static str> {
    Some(match error {
        rustls::Error::InvalidCertificate(problem) => match problem {
            // The latter if another authority has the same name, as after it was made anew.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "the API server's certificate was not issued by the kubeconfig's certificate-authority: put the certificate of its \
                 authority there"
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "the API server's certificate is for another name: connect to a name that it has, or set tls-server-name to one"
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "the API server's certificate has expired: renew it, or set the clock of this node"
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "the API server's certificate is not valid yet: set the clock of this node"
            }
            CertificateError::UnsupportedSignatureAlgorithmContext { .. }
            | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => UNSUPPORTED_KEY,
            _ => {
                "the API server's certificate cannot be used: have one issued of X.509 version 3, with the server's name or address as \
                 a subject alternative name"
            }
        },
        rustls::Error::PeerIncompatible(_) | rustls::Error::AlertReceived(AlertDescription::HandshakeFailure) => {
            UNSUPPORTED_KEY
        }
        rustls::Error::AlertReceived(
            AlertDescription::BadCertificate
            | AlertDescription::UnknownCA
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRequired,
        ) => {
            "the API server did not accept the client certificate: give one that is valid and of an authority that it believes"
        }
        rustls::Error::InvalidMessage(_) => {
            "the API server did not answer with TLS: if it is not served over https, begin its URL with http://"
        }
        _ => return None,
    })
}

const UNSUPPORTED_KEY: &str = "the API server's certificate or its protocol is of a kind that is not supported: have the certificate \
                               and those of its authorities made with RSA of 2048 bits or more, ECDSA with P-256 or P-384 (not P-521), \
                               or Ed25519, and let the server speak TLS 1.2 or 1.3";
