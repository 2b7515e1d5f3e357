//! Does: the home of etcd: one leader among coordinators, and the map, kept where the next leader finds it.
//!
//! A coordinator leads while a key of its lease exists. It writes the map only on the condition that this key is still the one it
//! made, so a leader that was taken for dead changes nothing, however late its words arrive.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a leader may be silent before another one leads.
const LEASE: Duration = Duration::from_secs(3);
/// How often a leader renews its lease.
const RENEW: Duration = Duration::from_millis(700);
/// The longest that one question may take at one endpoint.
const QUESTION: Duration = Duration::from_secs(1);
/// The longest answer that is read: a map, in base64, with room.
const ANSWER_BYTES: u64 = 8 << 20;

/// What is wrong with etcd.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum EtcdError {
    /// No endpoint answers.
    #[error("no etcd answers: {why}; see that it runs there, and that --etcd names its client port{}", tls_hint(*.tls))]
    Unreachable {
        /// What was seen at the last endpoint.
        why: String,
        /// Whether that was to speak TLS.
        tls: bool,
    },
    /// It answers, and says no.
    #[error("etcd at {endpoint} refused {what} with status {status}: {message}")]
    Refused {
        /// Which endpoint.
        endpoint: String,
        /// What was asked.
        what: &'static str,
        /// Its HTTP status.
        status: u16,
        /// What it said.
        message: String,
    },
    /// What it answers is not what its API promises.
    #[error("etcd answered {what} without {missing}: gradwire needs the v3 API, etcd 3.4 or newer")]
    Strange {
        /// What was asked.
        what: &'static str,
        /// What is missing.
        missing: &'static str,
    },
    /// Another coordinator leads.
    #[error("another coordinator leads by now")]
    NotLeader,
    /// What is to prove who is who cannot be used.
    #[error("{file}: {reason}")]
    Certificate {
        /// Which file.
        file: String,
        /// Why not.
        reason: String,
    },
}

/// Where etcd is, and how to get in.
#[derive(Clone, Debug, Default)]
pub struct EtcdSettings {
    /// Its client addresses, `http://10.0.0.1:2379` or https.
    pub endpoints: Vec<String>,
    /// The name of this cluster: its keys are `gradwire/NAME/...`.
    pub cluster: String,
    /// A file with the certificates that etcd's own is signed by; without it, those that the web trusts.
    pub ca: Option<std::path::PathBuf>,
    /// Files with a certificate and its key, where etcd asks for one.
    pub identity: Option<(std::path::PathBuf, std::path::PathBuf)>,
}

/// An etcd, spoken to by its JSON gateway.
pub(crate) struct Etcd {
    agent: ureq::Agent,
    endpoints: Vec<String>,
    /// The endpoint that answered last.
    turn: AtomicUsize,
    leader_key: String,
    map_key: String,
}

/// What came of standing for leader.
pub(crate) enum Election {
    /// This coordinator leads, with the map that the one before has left.
    Won(Office, Option<Vec<u8>>),
    /// That one leads.
    Lost(String),
}

impl Etcd {
    /// Says nothing to etcd yet.
    ///
    /// # Errors
    /// `Certificate` where a file cannot be read.
    pub(crate) fn new(settings: &EtcdSettings) -> Result<Arc<Self>, EtcdError> {
        let tls = tls_config(settings)?;
        let config = ureq::Agent::config_builder().timeout_global(Some(QUESTION)).http_status_as_error(false);
        let agent = config.tls_config(tls).build().into();
        let endpoints = settings.endpoints.iter().map(|one| with_scheme(one.trim())).collect();
        let key = |last| BASE64.encode(format!("gradwire/{}/{last}", settings.cluster));
        let turn = AtomicUsize::new(0);
        Ok(Arc::new(Self { agent, endpoints, turn, leader_key: key("leader"), map_key: key("map") }))
    }

    /// Leads, if nobody does. `name` is what others are told of the leader.
    ///
    /// # Errors
    /// Any [`EtcdError`] but `NotLeader`.
    pub(crate) fn stand(self: &Arc<Self>, name: &str) -> Result<Election, EtcdError> {
        // Most of the time somebody leads: looking costs etcd nothing.
        let leader = self.ask("kv/range", &json!({ "key": self.leader_key }))?;
        if let Some(who) = first_value(&leader["kvs"])? {
            return Ok(Election::Lost(String::from_utf8_lossy(&who).into_owned()));
        }
        let began = Instant::now();
        let granted = self.ask("lease/grant", &json!({ "TTL": LEASE.as_secs() }))?;
        let lease = number(&granted["ID"]).ok_or(EtcdError::Strange { what: "lease/grant", missing: "an ID" })?;
        let map = json!({ "request_range": { "key": self.map_key } });
        let outcome = self.ask(
            "kv/txn",
            &json!({
                "compare": [{ "target": "CREATE", "key": self.leader_key, "result": "EQUAL", "create_revision": "0" }],
                "success": [
                    { "request_put": { "key": self.leader_key, "value": BASE64.encode(name), "lease": lease.to_string() } },
                    map,
                ],
                "failure": [{ "request_range": { "key": self.leader_key } }],
            }),
        );
        let outcome = outcome.inspect_err(|_| self.revoke(lease))?;
        if outcome["succeeded"] != Value::Bool(true) {
            self.revoke(lease);
            let who = first_value(&outcome["responses"][0]["response_range"]["kvs"])?.unwrap_or_default();
            return Ok(Election::Lost(String::from_utf8_lossy(&who).into_owned()));
        }
        let revision = number(&outcome["header"]["revision"])
            .ok_or(EtcdError::Strange { what: "kv/txn", missing: "a revision" })?;
        let left = first_value(&outcome["responses"][1]["response_range"]["kvs"])?;
        Ok(Election::Won(Office::begin(Arc::clone(self), lease, revision, began), left))
    }

    fn revoke(&self, lease: i64) {
        if let Err(error) = self.ask("lease/revoke", &json!({ "ID": lease.to_string() })) {
            tracing::info!(%error, "a lease of etcd's was not given back: it ends by itself");
        }
    }

    /// Asks the endpoints in turn, that which answered last first.
    fn ask(&self, what: &'static str, question: &Value) -> Result<Value, EtcdError> {
        let (mut why, mut tls) = ("no endpoint is known".to_owned(), false);
        let first = self.turn.load(Ordering::Relaxed);
        for turn in first..first + self.endpoints.len() {
            let endpoint = &self.endpoints[turn % self.endpoints.len()];
            tls = endpoint.starts_with("https:");
            let asked = self.agent.post(format!("{endpoint}/v3/{what}")).send_json(question);
            let read = asked.and_then(|mut answer| {
                let body = answer.body_mut().with_config().limit(ANSWER_BYTES).read_to_string()?;
                Ok((answer.status().as_u16(), body))
            });
            match read {
                Ok((200, body)) => {
                    self.turn.store(turn, Ordering::Relaxed);
                    return serde_json::from_str(&body).map_err(|_| EtcdError::Strange { what, missing: "JSON" });
                }
                // A member without a leader answers so: another one may have one.
                Ok((503, body)) => why = format!("{endpoint}: {}", message(&body)),
                Ok((status, body)) => {
                    return Err(EtcdError::Refused {
                        endpoint: endpoint.clone(),
                        what,
                        status,
                        message: message(&body),
                    });
                }
                Err(error) => why = format!("{endpoint}: {error}"),
            }
        }
        Err(EtcdError::Unreachable { why, tls })
    }
}

/// Leadership, kept by a thread that renews it. Given back when this is dropped.
pub(crate) struct Office {
    etcd: Arc<Etcd>,
    lease: i64,
    /// The revision in which our key was made: no other leader has it.
    revision: i64,
    held: Arc<Held>,
    thread: Option<JoinHandle<()>>,
}

struct Held {
    lost: AtomicBool,
    /// When the lease was renewed last, at the latest.
    renewed: Mutex<Instant>,
    ended: Mutex<bool>,
    ending: Condvar,
}

impl Office {
    fn begin(etcd: Arc<Etcd>, lease: i64, revision: i64, renewed: Instant) -> Self {
        let held = Arc::new(Held {
            lost: AtomicBool::new(false),
            renewed: Mutex::new(renewed),
            ended: Mutex::new(false),
            ending: Condvar::new(),
        });
        let (ours, its) = (Arc::clone(&held), Arc::clone(&etcd));
        let renewing = move || {
            renew(&its, lease, &ours);
            ours.lost.store(true, Ordering::Release);
        };
        let thread = std::thread::Builder::new().name("gradwire-lease".to_owned()).spawn(renewing);
        let thread = thread.inspect_err(|error| {
            tracing::error!(%error, "the lease cannot be renewed");
            held.lost.store(true, Ordering::Release);
        });
        Self { etcd, lease, revision, held, thread: thread.ok() }
    }

    /// Whether this coordinator must not lead any more. By our clock a lease ends no later than by etcd's: we count from before
    /// the question.
    pub(crate) fn is_lost(&self) -> bool {
        self.held.lost.load(Ordering::Acquire) || self.held.is_over()
    }

    /// Keeps the map, before anybody is told it.
    ///
    /// # Errors
    /// `NotLeader` where another one leads; after any other error nobody knows whether it was kept: step down, and read it again.
    pub(crate) fn keep(&self, map: &[u8]) -> Result<(), EtcdError> {
        let etcd = &self.etcd;
        let revision = self.revision.to_string();
        let outcome = etcd.ask(
            "kv/txn",
            &json!({
                "compare": [{ "target": "CREATE", "key": etcd.leader_key, "result": "EQUAL", "create_revision": revision }],
                "success": [{ "request_put": { "key": etcd.map_key, "value": BASE64.encode(map) } }],
            }),
        )?;
        if outcome["succeeded"] == Value::Bool(true) { Ok(()) } else { Err(EtcdError::NotLeader) }
    }
}

impl Drop for Office {
    fn drop(&mut self) {
        let lost = self.is_lost();
        *self.held.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.held.ending.notify_all();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that renews the lease panicked");
        }
        // So that the next one need not wait for its end.
        if !lost {
            self.etcd.revoke(self.lease);
        }
    }
}

impl Held {
    fn is_over(&self) -> bool {
        self.renewed.lock().unwrap_or_else(PoisonError::into_inner).elapsed() >= LEASE
    }
}

/// Renews the lease until it is lost, or not wanted any more.
fn renew(etcd: &Etcd, lease: i64, held: &Held) {
    loop {
        let ended = held.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = held.ending.wait_timeout_while(ended, RENEW, |ended| !*ended);
        if *waited.unwrap_or_else(PoisonError::into_inner).0 {
            return;
        }
        let asked = Instant::now();
        match etcd.ask("lease/keepalive", &json!({ "ID": lease.to_string() })) {
            // A lease that has ended is answered without a time to live.
            Ok(answer) if number(&answer["result"]["TTL"]).is_some_and(|left| left > 0) => {
                *held.renewed.lock().unwrap_or_else(PoisonError::into_inner) = asked;
            }
            Ok(_) => return tracing::warn!("the lease at etcd has ended: another coordinator may lead"),
            Err(error) => tracing::warn!(%error, "the lease at etcd was not renewed"),
        }
        if held.is_over() {
            return tracing::warn!("etcd was not reached for a lease's time: another coordinator may lead");
        }
    }
}

/// What may be wrong beside, where both ends prove who they are.
fn tls_hint(tls: bool) -> &'static str {
    match tls {
        true => {
            "; that --etcd-ca has signed its certificate; and that it takes the one of --etcd-cert, where it asks for one"
        }
        false => "",
    }
}

fn with_scheme(endpoint: &str) -> String {
    let endpoint = endpoint.trim_end_matches('/');
    if endpoint.contains("://") { endpoint.to_owned() } else { format!("http://{endpoint}") }
}

fn tls_config(settings: &EtcdSettings) -> Result<ureq::tls::TlsConfig, EtcdError> {
    use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem};
    let wrong =
        |file: &std::path::Path, reason: String| EtcdError::Certificate { file: file.display().to_string(), reason };
    let read = |file: &std::path::Path| std::fs::read(file).map_err(|error| wrong(file, error.to_string()));
    let certificates = |file: &std::path::Path| -> Result<Vec<Certificate<'static>>, EtcdError> {
        let read = read(file)?;
        let found = parse_pem(&read).filter_map(|item| match item {
            Ok(PemItem::Certificate(one)) => Some(one),
            _ => None,
        });
        let found: Vec<_> = found.collect();
        if found.is_empty() { Err(wrong(file, "no certificate in it".to_owned())) } else { Ok(found) }
    };
    let mut config = TlsConfig::builder();
    if let Some(file) = &settings.ca {
        config = config.root_certs(RootCerts::new_with_certs(&certificates(file)?));
    }
    if let Some((chain, key)) = &settings.identity {
        let secret = PrivateKey::from_pem(&read(key)?).map_err(|error| wrong(key, error.to_string()))?;
        config = config.client_cert(Some(ClientCert::new_with_certs(&certificates(chain)?, secret)));
    }
    Ok(config.build())
}

/// The gateway writes 64-bit numbers as strings.
fn number(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_str()?.parse().ok())
}

/// The value of the one key that was asked for, if it is there.
fn first_value(found: &Value) -> Result<Option<Vec<u8>>, EtcdError> {
    let Some(value) = found[0].get("value") else { return Ok(None) };
    let decoded = value.as_str().and_then(|text| BASE64.decode(text).ok());
    decoded.map(Some).ok_or(EtcdError::Strange { what: "a key", missing: "a value" })
}

/// What an answer says of an error, cut short.
fn message(body: &str) -> String {
    let said = serde_json::from_str::<Value>(body).ok();
    let said = said.and_then(|said| said["message"].as_str().or_else(|| said["error"].as_str()).map(str::to_owned));
    said.unwrap_or_else(|| body.chars().take(200).collect())
}

#[cfg(test)]
mod tests;
