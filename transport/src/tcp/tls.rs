//! Does: TLS 1.3 for connections: reads certificates, makes sessions, and says what to do when two ends do not trust each other.

use crate::TransportError;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Connection, Error, RootCertStore, ServerConfig,
    ServerConnection,
};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Files, in PEM, that TLS is made of. None: no TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate that this end shows, and those between it and its CA (`GRADWIRE_TLS_CERT`). Needed to listen.
    pub cert: Option<PathBuf>,
    /// Its private key (`GRADWIRE_TLS_KEY`).
    pub key: Option<PathBuf>,
    /// Who must have signed the certificates of those that this end calls (`GRADWIRE_TLS_CA`). Needed to call.
    pub ca: Option<PathBuf>,
    /// Who must have signed the certificates of those that call this end (`GRADWIRE_TLS_CLIENT_CA`). Default: they need none.
    pub client_ca: Option<PathBuf>,
    /// The name that called ends must be certified for (`GRADWIRE_TLS_SERVER_NAME`). Default: the host, as it is called.
    pub server_name: Option<String>,
}

/// TLS as one end speaks it.
pub struct Tls {
    listens: Option<Arc<ServerConfig>>,
    calls: Option<Arc<ClientConfig>>,
    server_name: Option<String>,
    mutual: bool,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (listens, calls) = (self.listens.is_some(), self.calls.is_some());
        write!(f, "Tls {{ listens: {listens}, calls: {calls}, mutual: {} }}", self.mutual)
    }
}

impl Tls {
    /// Reads what `files` name; `None` where they name nothing.
    ///
    /// # Errors
    /// `Config` naming the setting, the file and what is wrong with it.
    pub fn load(files: &TlsFiles) -> Result<Option<Arc<Self>>, TransportError> {
        if *files == TlsFiles::default() {
            return Ok(None);
        }
        let own = match (&files.cert, &files.key) {
            (Some(cert), Some(key)) => Some((certificates("tls-cert", cert)?, private_key(key)?)),
            (None, None) => None,
            (Some(_), None) => {
                return Err(wrong("tls-key", "a certificate is of use only with its private key: give both"));
            }
            (None, Some(_)) => {
                return Err(wrong("tls-cert", "a private key is of use only with its certificate: give both"));
            }
        };
        if files.client_ca.is_some() && own.is_none() {
            return Err(wrong(
                "tls-client-ca",
                "who asks callers for certificates listens: give tls-cert and tls-key too",
            ));
        }
        if own.is_none() && files.ca.is_none() {
            return Err(wrong("tls-ca", "give the CA that has signed the certificates of the other ends"));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let clients = files.client_ca.as_deref().map(|path| roots("tls-client-ca", path)).transpose()?;
        let mutual = clients.is_some();
        let listens = own.as_ref().map(|own| server(&provider, own, clients)).transpose()?;
        let calls = files.ca.as_deref().map(|path| client(&provider, path, own.as_ref())).transpose()?;
        Ok(Some(Arc::new(Self { listens, calls, server_name: files.server_name.clone(), mutual })))
    }

    /// Whether callers must have a certificate of their own.
    pub fn is_mutual(&self) -> bool {
        self.mutual
    }

    /// Whether others can call this end.
    pub(super) fn check_listening(&self) -> Result<(), TransportError> {
        self.listens
            .as_ref()
            .map(|_| ())
            .ok_or_else(|| wrong("tls-cert", "who listens shows a certificate: give it, with tls-key"))
    }

    /// The session of a connection that came.
    pub(super) fn answer(&self) -> io::Result<Connection> {
        let config = self.listens.clone().ok_or(io::ErrorKind::InvalidInput)?;
        Ok(ServerConnection::new(config).map_err(io::Error::other)?.into())
    }

    /// The session of a connection to `host`.
    pub(super) fn call(&self, host: &str) -> Result<Connection, TransportError> {
        let reason = "who calls must know who has signed the other end's certificate: give the CA";
        let config = self.calls.clone().ok_or_else(|| wrong("tls-ca", reason))?;
        let name = self.server_name.as_deref().unwrap_or(host);
        let parsed = ServerName::try_from(name.to_owned());
        let parsed =
            parsed.map_err(|_| wrong("tls-server-name", &format!("`{name}` is no name that a certificate is for")))?;
        let session = ClientConnection::new(config, parsed);
        Ok(session.map_err(|error| TransportError::io("begin TLS", io::Error::other(error)))?.into())
    }

    /// The name that the end at `host` must be certified for.
    pub(super) fn name_of(&self, host: &str) -> String {
        self.server_name.clone().unwrap_or_else(|| host.to_owned())
    }
}

type Own = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn server(
    provider: &Arc<CryptoProvider>,
    (chain, key): &Own,
    clients: Option<RootCertStore>,
) -> Result<Arc<ServerConfig>, TransportError> {
    let builder = ServerConfig::builder_with_provider(Arc::clone(provider));
    let builder = builder.with_protocol_versions(&[&rustls::version::TLS13]).expect("ring has TLS 1.3");
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(roots) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider)).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| wrong("tls-client-ca", &error.to_string()))?)
        }
    };
    let made = builder.with_single_cert(chain.clone(), key.clone_key());
    let mut config = made.map_err(|error| wrong("tls-key", &format!("it does not fit tls-cert: {error}")))?;
    // Connections live as long as a job: nobody comes back with a ticket.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

fn client(provider: &Arc<CryptoProvider>, ca: &Path, own: Option<&Own>) -> Result<Arc<ClientConfig>, TransportError> {
    let builder = ClientConfig::builder_with_provider(Arc::clone(provider));
    let builder = builder.with_protocol_versions(&[&rustls::version::TLS13]).expect("ring has TLS 1.3");
    let builder = builder.with_root_certificates(roots("tls-ca", ca)?);
    let made = match own {
        None => Ok(builder.with_no_client_auth()),
        Some((chain, key)) => builder.with_client_auth_cert(chain.clone(), key.clone_key()),
    };
    Ok(Arc::new(made.map_err(|error| wrong("tls-key", &format!("it does not fit tls-cert: {error}")))?))
}

fn certificates(setting: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TransportError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let read = read.map_err(|error| wrong(setting, &format!("{}: {error}", path.display())))?;
    if read.is_empty() {
        return Err(wrong(setting, &format!("{}: there is no certificate in it (PEM is read)", path.display())));
    }
    Ok(read)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TransportError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| wrong("tls-key", &format!("{}: {error}", path.display())))
}

fn roots(setting: &str, path: &Path) -> Result<RootCertStore, TransportError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(setting, path)? {
        roots.add(certificate).map_err(|error| wrong(setting, &format!("{}: {error}", path.display())))?;
    }
    Ok(roots)
}

fn wrong(setting: &str, reason: &str) -> TransportError {
    TransportError::Config { setting: setting.to_owned(), reason: reason.to_owned() }
}

/// The error for a caller without TLS at a listener with it.
pub(super) fn wanted(address: String) -> TransportError {
    let (reason, remedy) = ("it takes only TLS", "give the CA of its certificate (tls-ca, GRADWIRE_TLS_CA)");
    TransportError::Tls { address, reason: reason.into(), remedy: remedy.into() }
}

/// The error of TLS in `error`, if that is what it is; `name`: what the other end had to be certified for.
pub(super) fn error_in(error: &io::Error, address: String, name: &str) -> Option<TransportError> {
    let error = error.get_ref()?.downcast_ref::<Error>()?;
    let remedy = match error {
        Error::InvalidMessage(_) => {
            "it does not speak TLS: start it with tls-cert and tls-key, or leave TLS away on both ends".to_owned()
        }
        Error::InvalidCertificate(wrong) => distrust(wrong, name),
        Error::AlertReceived(alert) => disliked(*alert),
        _ => "both ends must be of one version".to_owned(),
    };
    let reason = match error {
        // Its own text gives the time in seconds since 1970.
        Error::InvalidCertificate(CertificateError::ExpiredContext { .. }) => "its certificate has expired".to_owned(),
        Error::InvalidCertificate(CertificateError::NotValidForNameContext { presented, .. }) => {
            format!("its certificate is for {}, not for {name}", presented.join(", "))
        }
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "its certificate is not signed by the CA that we trust".to_owned()
        }
        other => other.to_string(),
    };
    Some(TransportError::Tls { address, reason: reason.into(), remedy: remedy.into() })
}

fn distrust(wrong: &CertificateError, name: &str) -> String {
    match wrong {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "give it a new certificate; if that one is new, look at this host's clock".to_owned()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "its certificate begins later: look at both hosts' clocks".to_owned()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            format!("call it by a name of its certificate, give it one for {name}, or set tls-server-name")
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "give the CA that has signed its certificate (tls-ca, GRADWIRE_TLS_CA)".to_owned()
        }
        _ => "give it a certificate of version 3 for its name, signed by the CA in tls-ca".to_owned(),
    }
}

fn disliked(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::CertificateRequired
        | AlertDescription::BadCertificate
        | AlertDescription::UnknownCA
        | AlertDescription::AccessDenied
        | AlertDescription::CertificateExpired
        | AlertDescription::DecryptError
        | AlertDescription::CertificateUnknown => {
            "it wants a certificate of ours, in date and signed by its tls-client-ca: give tls-cert and tls-key \
             (GRADWIRE_TLS_CERT, GRADWIRE_TLS_KEY)"
                .to_owned()
        }
        _ => "look into the other end's log".to_owned(),
    }
}
