//! The connection to the API server, over HTTP and in real time.

use service_watch::{ApiServer, Connection, Error, Source};
use test_apiserver::Server;

use crate::common::{listen, service};

#[tokio::test]
async fn a_kubeconfig_names_the_server_and_master_overrides_it() {
    let server = Server::new();
    server.apply(service("a", "10.96.0.1"));
    let address = server.listen().await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kubeconfig");
    Server::write_kubeconfig(&path, address);
    let elsewhere = directory.path().join("elsewhere");
    Server::write_kubeconfig(&elsewhere, "127.0.0.1:1".parse().unwrap());
    let mut last = None;
    for (kubeconfig, master) in [
        (Some(elsewhere.clone()), Some(format!("http://{address}"))),
        (Some(elsewhere), Some(address.to_string())),
        (None, Some(format!("http://{address}"))),
        (Some(path), None),
    ] {
        let connection = Connection { kubeconfig, master, user_agent: Some("test/1".into()) };
        let source = ApiServer::connect(&connection, "node-a").await.unwrap();
        assert_eq!(source.server(), format!("http://{address}"));
        let mut listener = listen(Source::ApiServer(source));
        assert_eq!(listener.synced().await, ["a 10.96.0.1"]);
        last = Some(listener);
    }
    let mut listener = last.unwrap();
    server.apply(service("b", "10.96.0.2"));
    assert_eq!(listener.change().await, "b 10.96.0.2");
    server.break_watches();
    server.delete("Service", "default", "b");
    assert_eq!(listener.change().await, "-b");
}

#[tokio::test]
async fn an_unusable_kubeconfig_is_an_error_with_its_path() {
    let directory = tempfile::tempdir().unwrap();
    let empty = directory.path().join("empty");
    std::fs::write(&empty, "apiVersion: v1\nkind: Config\n").unwrap();
    let broken = directory.path().join("broken");
    std::fs::write(&broken, "{ clusters: [").unwrap();
    for path in [directory.path().join("missing"), empty, broken] {
        let connection = Connection { kubeconfig: Some(path.clone()), ..Connection::default() };
        let error = ApiServer::connect(&connection, "node-a").await.unwrap_err();
        assert!(matches!(error, Error::Kubeconfig { .. }), "{error:?}");
        assert!(
            error.to_string().contains(path.to_str().unwrap()) && error.to_string().contains("check that"),
            "{error}"
        );
    }
    for master in ["ftp://server", "https://", "not a url"] {
        let connection = Connection { master: Some(master.into()), ..Connection::default() };
        let error = ApiServer::connect(&connection, "node-a").await.unwrap_err();
        assert!(matches!(error, Error::Master { .. }) && error.to_string().contains(master), "{error}");
    }
    let error = ApiServer::connect(&Connection::default(), "node-a").await.unwrap_err();
    assert!(matches!(error, Error::InCluster { .. }) && error.to_string().contains("kubeconfig"), "{error}");
}
