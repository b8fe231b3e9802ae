//! TLS towards the broker, and the one cryptography provider of the process.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use crate::config::MqttTls;

/// Why the broker's TLS cannot be set up. No retry mends it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error("cannot read {}: {source}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: pem::Error,
    },
    #[error("{} holds no certificate", .0.display())]
    NoCertificate(PathBuf),
    #[error("the system has no trusted certificates: configure the broker's ca")]
    NoRoots,
    #[error("the broker's TLS configuration does not fit together: {0}")]
    Rustls(#[from] rustls::Error),
}

/// Installs the cryptography provider that every TLS user of the process shares. May be repeated.
pub fn ensure_provider() {
    // An error means that one is installed already, which is all that is wanted.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// Mutual TLS as configured.
pub(super) fn client_config(tls: &MqttTls) -> Result<Arc<ClientConfig>, TlsError> {
    ensure_provider();
    let key =
        PrivateKeyDer::from_pem_file(&tls.key).map_err(|source| TlsError::Read { path: tls.key.clone(), source })?;
    let config = ClientConfig::builder()
        .with_root_certificates(roots(tls.ca.as_deref())?)
        .with_client_auth_cert(certificates(&tls.certificate)?, key)?;
    Ok(Arc::new(config))
}

fn roots(ca: Option<&Path>) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(path) => {
            for certificate in certificates(path)? {
                roots.add(certificate)?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(TlsError::NoRoots);
            }
        }
    }
    Ok(roots)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = |source| TlsError::Read { path: path.to_owned(), source };
    let found: Vec<_> = CertificateDer::pem_file_iter(path).map_err(read)?.collect::<Result<_, _>>().map_err(read)?;
    if found.is_empty() {
        return Err(TlsError::NoCertificate(path.to_owned()));
    }
    Ok(found)
}
