//! Does: an authority for tests, with the certificates that it signs, as files.
#![allow(dead_code)] // Not every test needs all of it.

use gradwire_transport::{Tls, TlsFiles};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use std::path::PathBuf;
use std::sync::Arc;
use tempfile::TempDir;

/// An authority. Its files go with it.
pub struct Authority {
    folder: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, "tests of gradwire");
        let key = KeyPair::generate().unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { issuer: Issuer::new(params, key), folder }
    }

    /// Its own certificate.
    pub fn ca(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// A certificate for `names`, and its key, until the end of `last_year`.
    pub fn sign(&self, names: &[&str], last_year: i32) -> (PathBuf, PathBuf) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let file = |kind: &str| self.folder.path().join(format!("{}-{last_year}.{kind}", names.join("-")));
        let mut params = CertificateParams::new(names.clone()).unwrap();
        (params.not_before, params.not_after) = (date_time_ymd(1990, 1, 1), date_time_ymd(last_year, 12, 31));
        let key = KeyPair::generate().unwrap();
        std::fs::write(file("crt"), params.signed_by(&key, &self.issuer).unwrap().pem()).unwrap();
        std::fs::write(file("key"), key.serialize_pem()).unwrap();
        (file("crt"), file("key"))
    }

    /// What an end with a certificate for `names` is given, which calls others of this authority too.
    pub fn files(&self, names: &[&str]) -> TlsFiles {
        let (cert, key) = self.sign(names, 2200);
        TlsFiles { cert: Some(cert), key: Some(key), ca: Some(self.ca()), ..TlsFiles::default() }
    }

    /// What an end is given that only calls.
    pub fn caller(&self) -> TlsFiles {
        TlsFiles { ca: Some(self.ca()), ..TlsFiles::default() }
    }
}

/// TLS by these files.
pub fn load(files: &TlsFiles) -> Option<Arc<Tls>> {
    Tls::load(files).unwrap()
}
