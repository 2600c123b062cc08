//! Runs the program that a kubeconfig names as its source of credentials (`exec`).

use std::fmt::Write as _;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use http::HeaderValue;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::json;
use tokio::time::timeout;

use super::credentials::bearer;
use super::kubeconfig::{Cluster, Exec};
use super::tls::ClientCertificate;

/// How long a request waits for the program. It goes on, and a later request takes what it returns.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How much of the standard error of a program that failed is in the message, in characters.
const MAX_ERROR_CHARS: usize = 400;
const VERSIONS: [&str; 2] = ["client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1"];

/// What a program returned.
#[derive(Debug)]
pub(super) struct Credential {
    pub(super) authorization: Option<HeaderValue>,
    pub(super) has_certificate: bool,
    expires: Option<Timestamp>,
}

type Run = Shared<BoxFuture<'static, Result<Arc<Credential>, String>>>;

/// A program with the credential that it returned last.
pub(super) struct Program {
    exec: Arc<Exec>,
    /// The value of `KUBERNETES_EXEC_INFO`.
    info: Arc<str>,
    certificate: ClientCertificate,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    credential: Option<Arc<Credential>>,
    run: Option<Run>,
}

impl Program {
    pub(super) fn new(exec: &Exec, cluster: &Cluster, certificate: ClientCertificate) -> Result<Self, String> {
        if exec.command.as_os_str().is_empty() {
            return Err("the user's exec has no command: name the program".to_owned());
        }
        let version = &exec.api_version;
        if !VERSIONS.contains(&version.as_str()) {
            return Err(format!(
                "the user's exec has apiVersion {version:?}: give {}, and a program for it",
                VERSIONS[0]
            ));
        }
        if exec.interactive_mode == "Always" {
            return Err("the user's exec has interactiveMode Always, and nobody can answer here: use another program"
                .to_owned());
        }
        if exec.env.iter().any(|variable| !is_variable(&variable.name, &variable.value)) {
            return Err("the user's exec has an env whose name is empty or has `=`: correct it".to_owned());
        }
        let mut spec = json!({ "interactive": false });
        if exec.provide_cluster_info {
            spec["cluster"] = cluster.for_program()?;
        }
        let info = json!({ "apiVersion": version, "kind": "ExecCredential", "spec": spec });
        let (exec, info) = (Arc::new(exec.clone()), info.to_string().into());
        Ok(Self { exec, info, certificate, state: Mutex::default() })
    }

    /// The credential that was returned last, or a new one if that has expired.
    pub(super) async fn credential(&self) -> Result<Arc<Credential>, String> {
        let run = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let fresh = |credential: &&Arc<Credential>| credential.expires.is_none_or(|at| Timestamp::now() < at);
            if let Some(credential) = state.credential.as_ref().filter(fresh) {
                return Ok(credential.clone());
            }
            state.run.get_or_insert_with(|| self.start()).clone()
        };
        let Ok(result) = timeout(ANSWER_TIMEOUT, run.clone()).await else {
            return Err(format!(
                "the program {}, which the kubeconfig names for credentials, has not answered for {} s: find out what it waits for",
                self.exec.command.display(),
                ANSWER_TIMEOUT.as_secs()
            ));
        };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.run.as_ref().is_some_and(|current| current.ptr_eq(&run)) {
            state.run = None;
            state.credential = result.as_ref().ok().cloned();
        }
        result
    }

    /// Forgets the credential, since the API server has refused it.
    pub(super) fn refused(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).credential = None;
    }

    fn start(&self) -> Run {
        let (exec, info, certificate) = (self.exec.clone(), self.info.clone(), self.certificate.clone());
        let task = tokio::task::spawn_blocking(move || run(&exec, &info, &certificate));
        let result = async move { task.await.map_err(|error| error.to_string())?.map(Arc::new) };
        result.boxed().shared()
    }
}

/// What the system takes as a variable of the environment.
fn is_variable(name: &str, value: &str) -> bool {
    !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0')
}

fn run(exec: &Exec, info: &str, certificate: &ClientCertificate) -> Result<Credential, String> {
    let command = exec.command.display();
    let mut program = Command::new(&exec.command);
    program.args(&exec.args).envs(exec.env.iter().map(|variable| (&variable.name, &variable.value)));
    // Nobody answers here, and standard input may be a socket that another program must not have.
    program.env("KUBERNETES_EXEC_INFO", info).stdin(Stdio::null());
    let output = program.output().map_err(|error| {
        let hint = if exec.install_hint.is_empty() { "" } else { "; its installHint: " };
        format!(
            "cannot run the program {command}, which the kubeconfig names for credentials: {error}; install it, or name another \
             file{hint}{}",
            exec.install_hint.trim()
        )
    })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim();
        let mut text =
            format!("the program {command}, which the kubeconfig names for credentials, failed ({})", output.status);
        if !said.is_empty() {
            let end: String = said.chars().take(MAX_ERROR_CHARS).collect();
            let _ = write!(text, ": {}", end.replace(['\n', '\r'], " "));
        }
        return Err(text);
    }
    parse(&output.stdout, exec, certificate)
        .map_err(|problem| format!("the program {command}, which the kubeconfig names for credentials, {problem}"))
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ExecCredential {
    api_version: String,
    status: Option<Status>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Status {
    expiration_timestamp: Option<String>,
    token: Option<String>,
    client_certificate_data: Option<String>,
    client_key_data: Option<String>,
}

fn parse(output: &[u8], exec: &Exec, certificate: &ClientCertificate) -> Result<Credential, String> {
    if output.trim_ascii().is_empty() {
        return Err("printed nothing: run it by hand and look".to_owned());
    }
    let read: ExecCredential = serde_saphyr::from_slice(output)
        .map_err(|_| "did not print an ExecCredential as JSON: run it by hand and look".to_owned())?;
    if read.api_version != exec.api_version {
        return Err(format!(
            "printed apiVersion {:?} instead of {:?}: correct apiVersion in the kubeconfig",
            read.api_version, exec.api_version
        ));
    }
    let status = read.status.ok_or("printed no status: run it by hand and look")?;
    let text = |field: Option<String>| field.filter(|text| !text.is_empty());
    let expires = text(status.expiration_timestamp).map(|text| text.parse::<Timestamp>()).transpose();
    let expires = expires.map_err(|_| "printed an expirationTimestamp that is not RFC 3339")?;
    let authorization = text(status.token).map(|token| bearer(&token, "printed a token: it")).transpose()?;
    let has_certificate = match (text(status.client_certificate_data), text(status.client_key_data)) {
        (Some(chain), Some(key)) => {
            certificate.set(chain.as_bytes(), key.as_bytes())?;
            true
        }
        (None, None) => false,
        _ => return Err("printed a certificate without a key, or a key without a certificate".to_owned()),
    };
    if authorization.is_none() && !has_certificate {
        return Err("printed neither a token nor a certificate: run it by hand and look".to_owned());
    }
    Ok(Credential { authorization, has_certificate, expires })
}
