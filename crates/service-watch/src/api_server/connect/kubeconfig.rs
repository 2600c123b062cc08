//! Reads a kubeconfig as client-go does, and selects the cluster and the user of its current context.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::{Map, Value};

/// The extension of a cluster that a credential program receives.
const EXEC_EXTENSION: &str = "client.authentication.k8s.io/exec";

/// The parts of a kubeconfig that are used. An empty string counts as absent, as in client-go.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct File {
    kind: String,
    #[serde(rename = "apiVersion")]
    api_version: String,
    current_context: String,
    clusters: Vec<NamedCluster>,
    contexts: Vec<NamedContext>,
    users: Vec<NamedUser>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct NamedCluster {
    name: String,
    cluster: Cluster,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct NamedContext {
    name: String,
    context: Context,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct NamedUser {
    name: String,
    user: User,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Context {
    cluster: String,
    user: String,
}

/// How to reach an API server.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(super) struct Cluster {
    pub(super) server: String,
    pub(super) insecure_skip_tls_verify: bool,
    pub(super) certificate_authority: PathBuf,
    pub(super) certificate_authority_data: String,
    pub(super) tls_server_name: String,
    pub(super) proxy_url: String,
    extensions: Vec<Extension>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Extension {
    name: String,
    extension: Value,
}

/// What the agent authenticates with.
#[derive(Clone, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(super) struct User {
    pub(super) token: String,
    #[serde(rename = "tokenFile")]
    pub(super) token_file: PathBuf,
    pub(super) username: String,
    pub(super) password: String,
    pub(super) client_certificate: PathBuf,
    pub(super) client_certificate_data: String,
    pub(super) client_key: PathBuf,
    pub(super) client_key_data: String,
    #[serde(rename = "as")]
    pub(super) impersonate: String,
    pub(super) as_uid: String,
    pub(super) as_groups: Vec<String>,
    pub(super) as_user_extra: BTreeMap<String, Vec<String>>,
    pub(super) auth_provider: Option<AuthProvider>,
    pub(super) exec: Option<Exec>,
}

/// A plugin that client-go has built in.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct AuthProvider {
    pub(super) name: String,
    pub(super) config: BTreeMap<String, String>,
}

/// A program that prints credentials.
#[derive(Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Exec {
    pub(super) api_version: String,
    pub(super) command: PathBuf,
    pub(super) args: Vec<String>,
    pub(super) env: Vec<Variable>,
    pub(super) install_hint: String,
    pub(super) interactive_mode: String,
    pub(super) provide_cluster_info: bool,
}

/// A variable of the environment.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Variable {
    pub(super) name: String,
    pub(super) value: String,
}

/// The cluster and the user of the current context.
#[derive(Default)]
pub(super) struct Selection {
    pub(super) cluster: Cluster,
    pub(super) user: User,
}

/// Reads the kubeconfig at a path. Relative paths in it become relative to its directory. Without a current context the
/// cluster is empty, which only another source of the server's URL can make up for.
pub(super) fn read(path: &Path) -> Result<Selection, String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    let mut selection = parse(&decode(&bytes)?)?;
    let directory = path.parent().unwrap_or(Path::new(""));
    let Selection { cluster, user } = &mut selection;
    let files =
        [&mut cluster.certificate_authority, &mut user.token_file, &mut user.client_certificate, &mut user.client_key];
    // A command without a slash is looked for in PATH.
    let command = user.exec.as_mut().map(|exec| &mut exec.command);
    let command = command.filter(|command| command.as_os_str().as_encoded_bytes().contains(&b'/'));
    for file in files.into_iter().chain(command) {
        if !file.as_os_str().is_empty() {
            *file = directory.join(&*file);
        }
    }
    Ok(selection)
}

/// The text of a file, which a byte order mark may begin.
fn decode(bytes: &[u8]) -> Result<String, String> {
    let utf16 = |bytes: &[u8], unit: fn([u8; 2]) -> u16| {
        let units: Vec<u16> = bytes.as_chunks().0.iter().map(|pair| unit(*pair)).collect();
        String::from_utf16(&units).map_err(|_| "it is not valid UTF-16: save it as UTF-8".to_owned())
    };
    match bytes {
        [0xff, 0xfe, rest @ ..] => utf16(rest, u16::from_le_bytes),
        [0xfe, 0xff, rest @ ..] => utf16(rest, u16::from_be_bytes),
        [0xef, 0xbb, 0xbf, rest @ ..] | rest => {
            String::from_utf8(rest.to_vec()).map_err(|_| "it is not valid UTF-8: save it as UTF-8".to_owned())
        }
    }
}

fn parse(text: &str) -> Result<Selection, String> {
    let document = without_nulls(document(text)?);
    if !document.is_object() {
        return Err("it is not an object: it must have clusters, contexts and current-context".to_owned());
    }
    // The error itself has the value, which may be a secret.
    let file: File = serde_path_to_error::deserialize(document).map_err(|error| {
        format!("{} has a value of another type; put a text that looks like a number in quotes", error.path())
    })?;
    if !matches!(&*file.kind, "" | "Config") || !matches!(&*file.api_version, "" | "v1") {
        return Err("it is not of apiVersion v1 and kind Config".to_owned());
    }
    let File { current_context, clusters, contexts, users, .. } = file;
    if current_context.is_empty() {
        return Ok(Selection::default());
    }
    // Of several entries with a name the first counts.
    let context = contexts.into_iter().find(|named| named.name == current_context);
    let Context { cluster, user } =
        context.ok_or_else(|| format!("the current-context {current_context:?} is not in it"))?.context;
    let found = clusters.into_iter().find(|named| named.name == cluster);
    // A user that is not there is as one without credentials.
    let user = users.into_iter().find(|named| named.name == user).map(|named| named.user);
    let cluster = found.ok_or_else(|| format!("the cluster {cluster:?} of the current context is not in it"))?.cluster;
    Ok(Selection { cluster, user: user.unwrap_or_default() })
}

/// The first document: the others are ignored.
fn document(text: &str) -> Result<Value, String> {
    // JSON may be indented by tabs, which YAML forbids.
    if let Ok(value) = serde_json::from_str(text) {
        return Ok(value);
    }
    let options = serde_saphyr::options! {
        duplicate_keys: serde_saphyr::options::DuplicateKeyPolicy::LastWins,
        with_snippet: false,
        strict_booleans: true,
    };
    let documents: Vec<Value> = serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|error| format!("it is neither YAML nor JSON: {}", error.to_string().replace('\n', " ")))?;
    Ok(documents.into_iter().next().unwrap_or_default())
}

/// A null is as a field that is not there.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let fields = fields.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(fields.map(|(key, value)| (key, without_nulls(value))).collect())
        }
        Value::Array(items) => {
            Value::Array(items.into_iter().filter(|item| !item.is_null()).map(without_nulls).collect())
        }
        Value::Null => Value::Object(Map::new()),
        other => other,
    }
}

/// The bytes of a field with base64, or else of a file; `None` if neither is set. `name` is that of the field.
pub(super) fn load(name: &str, data: &str, file: &Path) -> Result<Option<Vec<u8>>, String> {
    if !data.is_empty() {
        // Line breaks are no part of it.
        let data: String = data.split_ascii_whitespace().collect();
        let decoded = BASE64_STANDARD.decode(data).map_err(|error| {
            format!("{name}-data is not base64 ({error}): make it with `base64 -w0 FILE`, or name the file in {name}")
        })?;
        return Ok(Some(decoded));
    }
    if file.as_os_str().is_empty() {
        return Ok(None);
    }
    match std::fs::read(file) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) => Err(format!("cannot read {}, which {name} names: {error}", file.display())),
    }
}

impl Cluster {
    /// The certificates of the authority, as PEM.
    pub(super) fn authority(&self) -> Result<Option<Vec<u8>>, String> {
        load("certificate-authority", &self.certificate_authority_data, &self.certificate_authority)
    }

    /// What a credential program is told of the cluster.
    pub(super) fn for_program(&self) -> Result<Value, String> {
        let mut fields = Map::new();
        fields.insert("server".to_owned(), self.server.clone().into());
        if self.insecure_skip_tls_verify {
            fields.insert("insecure-skip-tls-verify".to_owned(), true.into());
        }
        if let Some(authority) = self.authority()? {
            fields.insert("certificate-authority-data".to_owned(), BASE64_STANDARD.encode(authority).into());
        }
        for (name, text) in [("tls-server-name", &self.tls_server_name), ("proxy-url", &self.proxy_url)] {
            if !text.is_empty() {
                fields.insert(name.to_owned(), text.clone().into());
            }
        }
        if let Some(found) = self.extensions.iter().find(|extension| extension.name == EXEC_EXTENSION) {
            fields.insert("config".to_owned(), found.extension.clone());
        }
        Ok(fields.into())
    }
}

/// A client's certificate and its key, as PEM.
pub(super) struct Identity {
    pub(super) certificate: Vec<u8>,
    pub(super) key: Vec<u8>,
}

impl User {
    /// The client's certificate and key.
    pub(super) fn identity(&self) -> Result<Option<Identity>, String> {
        let certificate = load("client-certificate", &self.client_certificate_data, &self.client_certificate)?;
        let key = load("client-key", &self.client_key_data, &self.client_key)?;
        match (certificate, key) {
            (Some(certificate), Some(key)) => Ok(Some(Identity { certificate, key })),
            (None, None) => Ok(None),
            (Some(_), None) => Err("the user has a client-certificate and no client-key: give both".to_owned()),
            (None, Some(_)) => Err("the user has a client-key and no client-certificate: give both".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selected(text: &str) -> Result<String, String> {
        parse(text).map(|Selection { cluster, user }| format!("{} {}", cluster.server, user.token))
    }

    #[test]
    fn a_kubeconfig_is_read_as_client_go_reads_it() {
        let base = "current-context: c\nclusters: [{name: k, cluster: {server: s}}]\n\
                    contexts: [{name: c, context: {cluster: k, user: u}}]\n";
        let with = |rest: &str| selected(&format!("{base}{rest}"));
        let ok = |text: &str| Ok(text.to_owned());
        assert_eq!(with("users: [{name: u, user: {token: t}}]"), ok("s t"));
        for no_user in ["", "users:", "users: null", "users: [{name: other}]", "users: [{name: u, user: }]"] {
            assert_eq!(with(no_user), ok("s "), "{no_user}");
        }
        assert_eq!(with("users: [{name: u, user: {token: a, token: b}}]"), ok("s b"), "the last of duplicate keys");
        assert_eq!(with("users: [{name: u, user: {token: a}}, {name: u}]"), ok("s a"), "the first of equal names");
        assert_eq!(with("users: [{name: u, user: {token: a, exec: null, colour: red}}]\n---\n"), ok("s a"));
        assert_eq!(with("users: [{name: u, user: {token: a}}]\n---\nusers: []\n"), ok("s a"), "the first document");
        assert_eq!(with("preferences: {}\nextensions: [{}]\nkind: Config\napiVersion: v1"), ok("s "));
        assert_eq!(selected(""), ok(" "));
        let tabs = "{\n\t\"current-context\": \"c\",\n\t\"contexts\": [{\"name\": \"c\", \"context\": {\"cluster\": \"k\"}}],\n\
                    \t\"clusters\": [{\"name\": \"k\", \"cluster\": {\"server\": \"s\"}}]\n}";
        assert_eq!(selected(tabs), ok("s "));
        for (text, problem) in [
            ("current-context: c", "the current-context \"c\" is not in it"),
            ("current-context: c\ncontexts: [{name: c, context: {cluster: k}}]", "the cluster \"k\""),
            ("kind: Pod", "kind Config"),
            ("apiVersion: v2", "apiVersion v1"),
            ("current-context: 5", "in quotes"),
            ("{ clusters: [", "neither YAML nor JSON"),
            ("[]", "not an object"),
            ("users: [{name: u, user: {token: 5}}]", "users[0].user.token has"),
        ] {
            let found = selected(text).unwrap_err();
            assert!(found.contains(problem) && !found.contains('5'), "{text}: {found}");
        }
    }

    #[test]
    fn a_kubeconfig_may_begin_with_a_byte_order_mark() {
        let text = "current-context: ü";
        let units = |bytes: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(bytes).collect::<Vec<u8>>();
        for bytes in [
            text.as_bytes().to_vec(),
            [&[0xef, 0xbb, 0xbf], text.as_bytes()].concat(),
            [vec![0xff, 0xfe], units(u16::to_le_bytes)].concat(),
            [vec![0xfe, 0xff], units(u16::to_be_bytes)].concat(),
        ] {
            assert_eq!(decode(&bytes).as_deref(), Ok(text));
        }
        assert!(decode(&[0xc3]).unwrap_err().contains("UTF-8"));
        assert!(decode(&[0xff, 0xfe, 0, 0xd8]).unwrap_err().contains("UTF-16"));
    }

    #[test]
    fn base64_may_have_line_breaks() {
        let none = Path::new("");
        for data in ["aGVsbG8=", "aGVs\nbG8=\n", "aGVs\r\n bG8="] {
            assert_eq!(load("x", data, none), Ok(Some(b"hello".to_vec())), "{data:?}");
        }
        assert_eq!(load("x", "", none), Ok(None));
        for data in ["aGVsbG8", "?", "-----BEGIN"] {
            assert!(load("x", data, none).unwrap_err().contains("base64 -w0"), "{data:?}");
        }
    }
}
