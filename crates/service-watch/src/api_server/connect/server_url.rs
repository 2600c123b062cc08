//! The URL of an API server, as client-go completes it.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::{HeaderValue, Uri};

/// An API server's URL without what is not sent to it.
#[derive(Debug)]
pub(super) struct ServerUrl {
    /// `http` or `https`, a host, and a path without a slash at its end.
    pub(super) uri: Uri,
    /// The `Authorization` that a user and a password in the URL stand for.
    pub(super) authorization: Option<HeaderValue>,
}

/// Completes a URL or `HOST:PORT`. Without a scheme it is https if `secure`, else http.
pub(super) fn parse(text: &str, secure: bool) -> Result<ServerUrl, String> {
    let text = text.trim();
    if text.is_empty() {
        return Err("it is empty".to_owned());
    }
    let bare = !text.contains("://");
    let full = if bare { format!("{}://{text}", if secure { "https" } else { "http" }) } else { text.to_owned() };
    let uri: Uri = full.parse().map_err(|error: http::uri::InvalidUri| error.to_string())?;
    let (scheme, authority) = match (uri.scheme_str(), uri.authority()) {
        (Some(scheme @ ("http" | "https")), Some(authority)) if !authority.host().is_empty() => (scheme, authority),
        _ => return Err("it needs http or https and a host".to_owned()),
    };
    let path = uri.path().trim_end_matches('/');
    if bare && !path.is_empty() {
        return Err("a path needs a scheme too: https://HOST:PORT/PATH".to_owned());
    }
    let (user, host) = match authority.as_str().rsplit_once('@') {
        Some((user, host)) => (Some(user), host),
        None => (None, authority.as_str()),
    };
    if host.len() > authority.host().len() && authority.port_u16().is_none() {
        return Err("its port is not a number from 0 to 65535".to_owned());
    }
    let uri = format!("{scheme}://{host}{path}").parse().map_err(|error: http::uri::InvalidUri| error.to_string())?;
    Ok(ServerUrl { uri, authorization: user.and_then(basic_of_url) })
}

/// The header for a user and a password as they stand in a URL.
pub(super) fn basic_of_url(user_info: &str) -> Option<HeaderValue> {
    let decode = |text: &str| percent_encoding::percent_decode_str(text).collect::<Vec<u8>>();
    let (user, password) = user_info.split_once(':').unwrap_or((user_info, ""));
    basic(&decode(user), &decode(password))
}

/// The `Authorization` for a user and a password.
pub(super) fn basic(user: &[u8], password: &[u8]) -> Option<HeaderValue> {
    let encoded = BASE64_STANDARD.encode([user, b":", password].concat());
    let mut value = HeaderValue::try_from(format!("Basic {encoded}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// The host and the port of a server's URL.
pub(in crate::api_server) fn host_and_port(server: &str) -> Option<(String, u16)> {
    let uri: Uri = server.parse().ok()?;
    let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("http") { 80 } else { 443 });
    Some((uri.host()?.trim_matches(['[', ']']).to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_and_port_of_a_url() {
        for (server, host, port) in [
            ("https://control-plane.test:6443", "control-plane.test", 6443),
            ("https://control-plane.test/path", "control-plane.test", 443),
            ("http://192.0.2.1", "192.0.2.1", 80),
            ("https://[fd00::1]:6443", "fd00::1", 6443),
        ] {
            assert_eq!(host_and_port(server), Some((host.to_owned(), port)), "{server}");
        }
        assert_eq!(host_and_port("/"), None);
    }

    #[test]
    fn a_server_without_a_scheme_is_completed() {
        for (text, secure, expected) in [
            ("192.0.2.1:6443", false, "http://192.0.2.1:6443/"),
            ("192.0.2.1:6443", true, "https://192.0.2.1:6443/"),
            ("api.test", true, "https://api.test/"),
            ("localhost:8080/", false, "http://localhost:8080/"),
            ("[fd00::1]:6443", true, "https://[fd00::1]:6443/"),
            ("http://192.0.2.1", true, "http://192.0.2.1/"),
            ("HTTPS://192.0.2.1:6443/", false, "https://192.0.2.1:6443/"),
            ("https://api.test/k8s/clusters/c-1/", false, "https://api.test/k8s/clusters/c-1"),
            (" https://api.test\n", false, "https://api.test/"),
            ("https://u:p@api.test:1?x=y", false, "https://api.test:1/"),
        ] {
            assert_eq!(parse(text, secure).unwrap().uri.to_string(), expected, "{text}");
        }
        for text in
            ["", " ", "ftp://x", "https://", "not a url", "unix:///run/x", "x:y", "https://x:99999", "api.test/path"]
        {
            assert!(parse(text, true).is_err(), "{text}: {:?}", parse(text, true));
        }
    }

    #[test]
    fn a_user_in_the_url_becomes_a_header() {
        let header = |text| parse(text, true).unwrap().authorization.map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(header("https://u:p@h"), Some("Basic dTpw".to_owned()));
        assert_eq!(header("https://u:%40@h"), Some("Basic dTpA".to_owned()));
        assert_eq!(header("https://u@h"), Some("Basic dTo=".to_owned()));
        assert_eq!(header("https://h"), None);
    }
}
