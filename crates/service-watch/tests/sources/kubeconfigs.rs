//! Kubeconfigs as they are found, each tried against an API server: what client-go takes is taken, and of what is not, a
//! message says what to do.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use service_watch::{ApiServer, Connection};
use test_apiserver::{Server, ServerCertificate, TlsListener};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};

use crate::common::service;

const RSA: &str = include_str!("identities/rsa-pkcs8.key");
const RSA_PKCS1: &str = include_str!("identities/rsa-pkcs1.key");
const RSA_1024: &str = include_str!("identities/rsa-1024.key");
const VERSION_1: &str = include_str!("identities/version-1.crt");
const P256_SEC1: &str = include_str!("identities/p256-sec1.key");
const P256: &str = include_str!("identities/p256.crt");
const P521_KEY: &str = include_str!("identities/p521.key");
const P521: &str = include_str!("identities/p521.crt");
const ENCRYPTED: &str = include_str!("identities/encrypted.key");

/// The servers and files that the kubeconfigs are about.
struct Places {
    directory: tempfile::TempDir,
    /// Needs the token `secret`.
    http: SocketAddr,
    /// Needs it too.
    https: TlsListener,
    self_signed: TlsListener,
    self_signed_authority: TlsListener,
    /// Needs a client certificate too.
    asking: TlsListener,
    connect_proxy: SocketAddr,
    socks_proxy: SocketAddr,
}

impl Places {
    async fn new() -> Self {
        let server = Server::new();
        server.apply(service("a", "10.96.0.1"));
        server.require_token("secret");
        let tls = |kind| server.listen_with_certificate_in_thread(kind).unwrap();
        let places = Self {
            directory: tempfile::tempdir().unwrap(),
            http: server.listen().await.unwrap(),
            https: tls(ServerCertificate::Issued),
            self_signed: tls(ServerCertificate::SelfSigned),
            self_signed_authority: tls(ServerCertificate::SelfSignedAuthority),
            asking: tls(ServerCertificate::IssuedAndAsking),
            connect_proxy: proxy(connect_request).await,
            socks_proxy: proxy(socks_request).await,
        };
        places.write("ca.crt", &places.https.authority());
        places.write("token", "secret\n");
        places.write("wrong-token", "wrong");
        places.write("empty", "");
        places
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.path(name), content).unwrap();
    }

    fn program(&self, name: &str, script: &str) {
        self.write(name, &format!("#!/bin/sh\n{script}\n"));
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Lists Services by a kubeconfig: whether that succeeds, or why not.
    async fn list(&self, kubeconfig: &str) -> Result<(), String> {
        self.write("kubeconfig", kubeconfig);
        self.list_by(Connection { kubeconfig: Some(self.path("kubeconfig")), ..Connection::default() }).await
    }

    async fn list_by(&self, connection: Connection) -> Result<(), String> {
        let source = ApiServer::connect(&connection, "node-a").await.map_err(|error| error.to_string())?;
        let request = http::Request::get("/api/v1/services").body(Vec::new()).unwrap();
        match source.client().request_text(request).await {
            Ok(text) if text.contains("10.96.0.1") => Ok(()),
            Ok(text) => Err(text),
            Err(error) => {
                let mut text = error.to_string();
                let mut cause = std::error::Error::source(&error);
                while let Some(inner) = cause {
                    text = format!("{text}: {inner}");
                    cause = inner.source();
                }
                Err(text)
            }
        }
    }
}

/// A kubeconfig with these fields of the cluster and of the user.
fn kubeconfig(cluster: &str, user: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: k, cluster: {{{cluster}}}}}]\n\
         contexts: [{{name: c, context: {{cluster: k, user: u}}}}]\nusers: [{{name: u, user: {{{user}}}}}]\n"
    )
}

fn base64(text: &str) -> String {
    BASE64_STANDARD.encode(text)
}

/// As `base64` prints it without `-w0`.
fn wrapped(text: &str) -> String {
    let lines: Vec<String> =
        base64(text).as_bytes().chunks(76).map(|line| String::from_utf8(line.to_vec()).unwrap()).collect();
    lines.join("\\n")
}

fn identity(certificate: &str, key: &str) -> String {
    format!("token: secret, client-certificate-data: {}, client-key-data: {}", base64(certificate), base64(key))
}

/// What is not to be used fails with one of these in the message.
type Outcome = Result<(), &'static str>;

#[tokio::test]
async fn a_server_is_reached_as_client_go_reaches_it() {
    let places = Places::new().await;
    let (http, https) = (places.http, places.https.address());
    let authority = format!("certificate-authority-data: {}", base64(&places.https.authority()));
    let data = |listener: &TlsListener, pem: &str| {
        format!("server: 'https://{}', certificate-authority-data: {}", listener.address(), base64(pem))
    };
    let other = Server::new().listen_over_tls_in_thread().unwrap();
    let (https_authority, other_authority) = (places.https.authority(), other.authority());
    let (connect, socks) = (places.connect_proxy, places.socks_proxy);
    let cases: Vec<(String, Outcome)> = vec![
        (format!("server: 'http://{http}'"), Ok(())),
        (format!("server: 'http://{http}/'"), Ok(())),
        (format!("server: 'HTTP://{http}'"), Ok(())),
        (format!("server: '{http}'"), Ok(())),
        (format!("server: ' http://{http} '"), Ok(())),
        (format!("server: 'http://localhost:{}'", http.port()), Ok(())),
        (format!("server: 'https://{https}', {authority}"), Ok(())),
        (format!("server: '{https}', {authority}"), Ok(())),
        (format!("server: 'https://{https}', certificate-authority: ca.crt"), Ok(())),
        (format!("server: 'https://{https}', certificate-authority: ./ca.crt"), Ok(())),
        (format!("server: 'https://{https}', certificate-authority: '{}'", places.path("ca.crt").display()), Ok(())),
        (format!("server: 'https://{https}', certificate-authority: /nonexistent, {authority}"), Ok(())),
        (format!("server: 'https://{https}', certificate-authority-data: \"{}\"", wrapped(&https_authority)), Ok(())),
        (data(&places.https, &format!("# a comment\n{other_authority}\n{https_authority}")), Ok(())),
        (data(&places.https, &https_authority.replace('\n', "\r\n")), Ok(())),
        (
            data(
                &places.https,
                &format!("{https_authority}-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
            ),
            Ok(()),
        ),
        (data(&places.https, &places.https.certificate()), Ok(())),
        (data(&places.self_signed, &places.self_signed.authority()), Ok(())),
        (data(&places.self_signed_authority, &places.self_signed_authority.authority()), Ok(())),
        (format!("server: 'https://{https}', insecure-skip-tls-verify: true"), Ok(())),
        (format!("server: '{https}', insecure-skip-tls-verify: true"), Ok(())),
        (format!("server: 'https://localhost:{}', tls-server-name: 127.0.0.1, {authority}", https.port()), Ok(())),
        (
            format!("server: 'https://{https}', {authority}, disable-compression: true, extensions: null, more: [1]"),
            Ok(()),
        ),
        (format!("server: 'https://{https}', {authority}, proxy-url: 'http://{connect}'"), Ok(())),
        (format!("server: 'https://{https}', {authority}, proxy-url: 'http://u:p%40@{connect}/'"), Ok(())),
        (format!("server: 'https://{https}', {authority}, proxy-url: 'socks5://{socks}'"), Ok(())),
        (format!("server: 'http://{http}', proxy-url: 'http://{connect}'"), Ok(())),
        (format!("server: 'http://{http}', proxy-url: ''"), Ok(())),
        // What client-go refuses too, or TLS here, with what to do.
        ("server: ''".to_owned(), Err("names no server")),
        ("server: 'unix:///run/x'".to_owned(), Err("give one such as https://")),
        ("server: 'https://127.0.0.1:99999'".to_owned(), Err("give one such as https://")),
        ("server: '127.0.0.1:1/path'".to_owned(), Err("give one such as https://")),
        (format!("server: 'https://{https}', {authority}, proxy-url: 'ftp://{connect}'"), Err("proxy-url is unusable")),
        (format!("server: 'https://{https}', {authority}, insecure-skip-tls-verify: true"), Err("remove the latter")),
        (format!("server: 'https://{https}', certificate-authority-data: '?'"), Err("base64 -w0")),
        (format!("server: 'https://{https}', certificate-authority-data: AAAA"), Err("no block BEGIN CERTIFICATE")),
        (format!("server: 'https://{https}', certificate-authority: nonexistent"), Err("cannot read")),
        (data(&places.https, &other_authority), Err("was not issued by the kubeconfig's certificate-authority")),
        (data(&places.https, P521), Err("was not issued by the kubeconfig's certificate-authority")),
        (format!("server: 'https://localhost:{}', {authority}", https.port()), Err("set tls-server-name")),
        (format!("server: 'https://{https}', tls-server-name: 'a b', {authority}"), Err("tls-server-name \"a b\"")),
        (format!("server: 'https://{http}', {authority}"), Err("begin its URL with http://")),
    ];
    for (cluster, expected) in cases {
        check(&cluster, &places.list(&kubeconfig(&cluster, "token: secret")).await, expected);
    }
}

fn check(what: &str, result: &Result<(), String>, expected: Outcome) {
    match (result, expected) {
        (Ok(()), Ok(())) => {}
        (Err(problem), Err(part)) if problem.contains(part) => {}
        _ => panic!("{what}: {result:?} instead of {expected:?}"),
    }
    assert!(!format!("{result:?}").contains("secret"), "{what}: {result:?}");
}

#[tokio::test]
async fn a_user_is_authenticated_as_by_client_go() {
    let places = Places::new().await;
    let exec = |script: &str| {
        places.program("program", script);
        "exec: {apiVersion: client.authentication.k8s.io/v1, command: ./program, interactiveMode: Never}".to_owned()
    };
    let token = r#"printf '%s' '{"apiVersion": "client.authentication.k8s.io/v1", "status": {"token": "secret"}}'"#;
    let with_token = |token: &str| exec_output(&format!(r#""token": "{token}""#));
    let directory = places.directory.path().display();
    let cases: Vec<(String, Option<String>, Outcome)> = vec![
        ("token: secret".into(), None, Ok(())),
        (r#"token: "secret\n""#.into(), None, Ok(())),
        (r#"token: "\r\nsecret  \n""#.into(), None, Ok(())),
        ("tokenFile: token".into(), None, Ok(())),
        (format!("tokenFile: '{directory}/token'"), None, Ok(())),
        ("token: wrong, tokenFile: token".into(), None, Ok(())),
        ("token: secret, tokenFile: nonexistent".into(), None, Ok(())),
        ("token: secret, tokenFile: empty".into(), None, Ok(())),
        (
            "token: secret, exec: {apiVersion: client.authentication.k8s.io/v1, command: nonexistent}".into(),
            None,
            Ok(()),
        ),
        ("token: secret, password: null, exec: null, as-groups: null".into(), None, Ok(())),
        ("auth-provider: {name: oidc, config: {id-token: secret}}".into(), None, Ok(())),
        ("token: secret, as: somebody, as-uid: '1', as-groups: [a, b], as-user-extra: {a/b: [c]}".into(), None, Ok(())),
        (exec(token), Some(token.into()), Ok(())),
        (exec(token).replace("./program", &format!("{directory}/program")), Some(token.into()), Ok(())),
        (exec(token).replace(", interactiveMode: Never", ""), Some(token.into()), Ok(())),
        (exec(token), Some(format!("cat >/dev/null; {token}")), Ok(())),
        (exec(token), Some(with_token(r"secret\n")), Ok(())),
        (exec(token), Some(format!("{}\n", with_token("secret"))), Ok(())),
        (
            exec(token),
            Some("printf 'apiVersion: client.authentication.k8s.io/v1\\nstatus:\\n  token: secret\\n'".into()),
            Ok(()),
        ),
        (
            exec(token).replace("Never", "Never, env: [{name: A, value: b}]"),
            Some(format!("[ $A = b ] && {token}")),
            Ok(()),
        ),
        (
            exec(token).replace("Never", "Never, args: [x, 'y z']"),
            Some(format!("[ \"$2\" = 'y z' ] && {token}")),
            Ok(()),
        ),
        (
            exec(token).replace("Never", "Never, provideClusterInfo: true"),
            Some(format!("case $KUBERNETES_EXEC_INFO in *'\"server\":\"http://'*) {token};; esac")),
            Ok(()),
        ),
        // The others are refused.
        (String::new(), None, Err("401")),
        ("token: wrong".into(), None, Err("401")),
        ("username: u, password: p".into(), None, Err("401")),
        ("token: secret, tokenFile: wrong-token".into(), None, Err("401")),
        (r#"token: "sec\nret""#.into(), None, Err("remove them")),
        (r#"token: "sec\0ret""#.into(), None, Err("remove them")),
        ("token: 12345".into(), None, Err("in quotes")),
        ("tokenFile: nonexistent".into(), None, Err("cannot read the token file")),
        ("tokenFile: empty".into(), None, Err("is empty: write the token there")),
        ("token: secret, username: u, password: p".into(), None, Err("keep one of them")),
        ("token: secret, as-groups: [a]".into(), None, Err("add the user name")),
        ("auth-provider: {name: gcp, config: {cmd-path: /bin/true}}".into(), None, Err("use exec")),
        ("auth-provider: {name: oidc}".into(), None, Err("use exec")),
        (r#"auth-provider: {name: oidc, config: {id-token: "a\0b"}}"#.into(), None, Err("remove them")),
        ("exec: {apiVersion: client.authentication.k8s.io/v1}".into(), None, Err("name the program")),
        ("exec: {command: ./program}".into(), None, Err("give client.authentication.k8s.io/v1")),
        (exec(token).replace("io/v1", "io/v1alpha1"), None, Err("give client.authentication.k8s.io/v1")),
        (exec(token).replace("Never", "Always"), None, Err("nobody can answer here")),
        (
            exec(token).replace("./program", "./other, installHint: 'get it at the counter'"),
            None,
            Err("get it at the counter"),
        ),
        (exec(token), Some("echo no luck >&2; exit 3".into()), Err("no luck")),
        (exec(token), Some("echo '{'".into()), Err("run it by hand")),
        (exec(token), Some("exit 0".into()), Err("run it by hand")),
        (exec(token), Some(token.replace("io/v1", "io/v1beta1")), Err("correct apiVersion")),
        (exec(token), Some(exec_output(r#""token": """#)), Err("neither a token nor a certificate")),
        (exec(token), Some(with_token(r"sec\nret")), Err("remove them")),
        (exec(token), Some(exec_output(r#""token": "secret", "expirationTimestamp": "soon""#)), Err("RFC 3339")),
    ];
    let server = format!("server: 'http://{}'", places.http);
    for (user, script, expected) in cases {
        if let Some(script) = &script {
            places.program("program", script);
        }
        check(&format!("{user} {script:?}"), &places.list(&kubeconfig(&server, &user)).await, expected);
    }
}

/// A script that prints an `ExecCredential` with these fields of its status.
fn exec_output(status: &str) -> String {
    format!(
        "cat <<'END'\n{{\"apiVersion\": \"client.authentication.k8s.io/v1\", \"kind\": \"ExecCredential\", \"status\": {{{status}}}}}\nEND"
    )
}

#[tokio::test]
async fn a_client_certificate_is_taken_as_by_client_go() {
    let places = Places::new().await;
    let server = format!(
        "server: 'https://{}', certificate-authority-data: {}",
        places.asking.address(),
        base64(&places.asking.authority())
    );
    places.write("client.pem", &format!("{P256_SEC1}{P256}"));
    let data = |pem: &str| serde_json::to_string(pem).unwrap();
    let by_program = exec_output(&format!(
        r#""token": "secret", "clientCertificateData": {}, "clientKeyData": {}"#,
        data(P256),
        data(P256_SEC1)
    ));
    places.program("program", &by_program);
    let files = "token: secret, client-certificate: client.pem, client-key: ./client.pem";
    for (user, expected) in [
        (identity(P256, P256_SEC1), Ok(())),
        (identity(VERSION_1, RSA), Ok(())),
        (identity(VERSION_1, RSA_PKCS1), Ok(())),
        (identity(&format!("subject=x\n{P256}"), &P256_SEC1.replace('\n', "\r\n")), Ok(())),
        (files.to_owned(), Ok(())),
        ("exec: {apiVersion: client.authentication.k8s.io/v1, command: ./program}".to_owned(), Ok(())),
        ("token: secret".to_owned(), Err("did not accept the client certificate")),
        (identity(P521, P521_KEY), Err("(not P-521)")),
        (identity(VERSION_1, RSA_1024), Err("RSA with 2048")),
        (identity(P256, ENCRYPTED), Err("`openssl pkey` converts it")),
        (identity(P256, P256), Err("`openssl pkey` converts it")),
        (identity(P256_SEC1, P256_SEC1), Err("give it as PEM")),
        (format!("token: secret, client-certificate-data: {}", base64(P256)), Err("no client-key: give both")),
        ("token: secret, client-key: client.pem".to_owned(), Err("no client-certificate: give both")),
        ("token: secret, client-certificate: nonexistent, client-key: client.pem".to_owned(), Err("cannot read")),
    ] {
        check(&user.clone(), &places.list(&kubeconfig(&server, &user)).await, expected);
    }
    let mismatch = identity(&places.https.certificate(), P256_SEC1);
    check(&mismatch, &places.list(&kubeconfig(&server, &mismatch)).await, Err("the two that belong together"));
}

#[tokio::test]
async fn a_master_takes_the_place_of_the_kubeconfigs_server() {
    let places = Places::new().await;
    let user = "users: [{name: u, user: {token: secret}}]";
    for (text, master, expected) in [
        (kubeconfig("server: 'http://127.0.0.1:1'", "token: secret"), places.http.to_string(), Ok(())),
        (kubeconfig("", "token: secret"), format!("http://{}/", places.http), Ok(())),
        (kubeconfig("certificate-authority: ca.crt", "token: secret"), places.https.address().to_string(), Ok(())),
        (user.to_owned(), places.http.to_string(), Err("401")),
        (kubeconfig("", "token: secret"), "ftp://x".to_owned(), Err("give a URL such as https://")),
    ] {
        places.write("kubeconfig", &text);
        let kubeconfig = Some(places.path("kubeconfig"));
        let connection = Connection { kubeconfig, master: Some(master.clone()), user_agent: None };
        check(&format!("{text} {master}"), &places.list_by(connection).await, expected);
    }
}

#[tokio::test]
async fn a_replaced_token_file_is_used_at_once_and_a_bad_one_is_not() {
    let places = Places::new().await;
    places.write("kubeconfig", &kubeconfig(&format!("server: 'http://{}'", places.http), "tokenFile: token"));
    let connection = Connection { kubeconfig: Some(places.path("kubeconfig")), ..Connection::default() };
    let source = ApiServer::connect(&connection, "node-a").await.unwrap();
    let list = || source.client().request_text(http::Request::get("/api/v1/services").body(Vec::new()).unwrap());
    for (token, served) in [("secret", true), ("", true), ("wrong", false), ("\0", false), ("secret\n\n", true)] {
        places.write("token", token);
        assert_eq!(list().await.is_ok(), served, "{token:?}");
    }
    fs::remove_file(places.path("token")).unwrap();
    list().await.unwrap();
}

#[tokio::test]
async fn a_program_that_does_not_answer_is_told_and_waited_for() {
    let places = Places::new().await;
    let token = exec_output(r#""token": "secret""#);
    places.program("program", &format!("until [ -e '{}' ]; do sleep 0.1; done\n{token}", places.path("go").display()));
    let user = "exec: {apiVersion: client.authentication.k8s.io/v1, command: ./program}";
    places.write("kubeconfig", &kubeconfig(&format!("server: 'http://{}'", places.http), user));
    let connection = Connection { kubeconfig: Some(places.path("kubeconfig")), ..Connection::default() };
    let source = ApiServer::connect(&connection, "node-a").await.unwrap();
    let list = || source.client().request_text(http::Request::get("/api/v1/services").body(Vec::new()).unwrap());
    let problem = list().await.unwrap_err();
    let text = format!("{problem:?}");
    assert!(text.contains("has not answered for 10 s: find out"), "{text}");
    places.write("go", "");
    list().await.unwrap();
    // It is run again when the server does not accept what it returned.
    places.program("program", &exec_output(r#""token": "wrong""#));
    list().await.unwrap();
    assert!(ApiServer::check(&connection).await.is_ok());
    places.program("program", "exit 1");
    assert!(ApiServer::check(&connection).await.unwrap_err().to_string().contains("exit status: 1"));
}

async fn proxy<F>(request: fn(TcpStream) -> F) -> SocketAddr
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = request(connection).await;
            });
        }
    });
    address
}

async fn connect_request(mut client: TcpStream) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let target = head.split(' ').nth(1).unwrap_or_default();
    let mut server = TcpStream::connect(target).await?;
    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
    copy_bidirectional(&mut client, &mut server).await.map(drop)
}

/// SOCKS 5 without authentication, to an IPv4 address (RFC 1928), or to one that is given as a name.
async fn socks_request(mut client: TcpStream) -> io::Result<()> {
    let mut greeting = [0; 2];
    client.read_exact(&mut greeting).await?;
    client.read_exact(&mut vec![0; usize::from(greeting[1])]).await?;
    client.write_all(&[5, 0]).await?;
    let mut head = [0; 4];
    client.read_exact(&mut head).await?;
    let host = if head[3] == 1 {
        Ipv4Addr::from_bits(client.read_u32().await?).to_string()
    } else {
        let mut name = vec![0; usize::from(client.read_u8().await?)];
        client.read_exact(&mut name).await?;
        String::from_utf8_lossy(&name).into_owned()
    };
    let mut server = TcpStream::connect((host.as_str(), client.read_u16().await?)).await?;
    client.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await?;
    copy_bidirectional(&mut client, &mut server).await.map(drop)
}
