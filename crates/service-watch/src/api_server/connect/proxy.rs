//! Which proxy leads to the API server: that of the kubeconfig, or else that of the environment as Go reads it.

use std::net::IpAddr;

use http::Uri;
use ipnet::IpNet;

use super::server_url::host_and_port;

/// The proxy for `server`, `None` for a direct connection. `proxy_url` is the kubeconfig's, and empty if it has none;
/// `variable` looks up a variable of the environment.
pub(super) fn proxy_for(
    server: &Uri,
    proxy_url: &str,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Option<Uri>, String> {
    // The kubeconfig's is for this cluster, so no exception of the environment applies to it.
    if !proxy_url.trim().is_empty() {
        return parse(proxy_url, false).map(Some).map_err(|problem| format!("proxy-url is unusable: {problem}"));
    }
    let first = |names: [&'static str; 2]| {
        let values = names.into_iter().map(|name| (name, variable(name).unwrap_or_default()));
        values.into_iter().find(|(_, value)| !value.trim().is_empty())
    };
    let names = if server.scheme_str() == Some("https") {
        ["HTTPS_PROXY", "https_proxy"]
    } else {
        ["HTTP_PROXY", "http_proxy"]
    };
    let Some((name, proxy)) = first(names) else { return Ok(None) };
    let (_, exceptions) = first(["NO_PROXY", "no_proxy"]).unwrap_or_default();
    let Some((host, port)) = host_and_port(&server.to_string()) else { return Ok(None) };
    if is_exempt(&host, port, &exceptions) {
        return Ok(None);
    }
    let proxy = parse(&proxy, true).map_err(|problem| {
        format!("the variable {name} of the environment is unusable: {problem}; correct it, or add the API server to NO_PROXY")
    })?;
    Ok(Some(proxy))
}

fn parse(text: &str, may_lack_scheme: bool) -> Result<Uri, String> {
    let text = text.trim();
    let full = if may_lack_scheme && !text.contains("://") { format!("http://{text}") } else { text.to_owned() };
    let uri: Uri = full.parse().map_err(|error: http::uri::InvalidUri| error.to_string())?;
    let has_host = uri.host().is_some_and(|host| !host.is_empty());
    match uri.scheme_str() {
        Some("http" | "https" | "socks5" | "socks5h") if has_host => Ok(uri),
        _ => Err("it needs http, https or socks5 and a host, such as http://192.0.2.1:3128".to_owned()),
    }
}

/// Whether no proxy is used for a host: those of this machine, and those that `NO_PROXY` lists.
fn is_exempt(host: &str, port: u16, exceptions: &str) -> bool {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let address = host.parse::<IpAddr>().ok().map(|address| address.to_canonical());
    if host == "localhost" || address.is_some_and(|address| address.is_loopback()) {
        return true;
    }
    exceptions.split(',').map(|entry| entry.trim().to_ascii_lowercase()).any(|entry| {
        if entry == "*" {
            return true;
        }
        if let Ok(range) = entry.parse::<IpNet>() {
            return address.is_some_and(|address| range.contains(&address));
        }
        let (name, only_port) = split_port(&entry);
        if name.is_empty() || only_port.is_some_and(|only| only != port) {
            return false;
        }
        if let Ok(other) = name.parse::<IpAddr>() {
            return address == Some(other.to_canonical());
        }
        // `.example.org` and `*.example.org` leave out the domain itself.
        let domain = name.strip_prefix('*').unwrap_or(name);
        match domain.strip_prefix('.') {
            Some(_) => host.ends_with(domain),
            None => host == domain || host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.')),
        }
    })
}

/// The name or address of an entry, and its port if it has one.
fn split_port(entry: &str) -> (&str, Option<u16>) {
    if let Some((address, rest)) = entry.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return (address, rest.strip_prefix(':').and_then(|port| port.parse().ok()));
    }
    match entry.split_once(':') {
        Some((name, port)) if !port.contains(':') => (name, port.parse().ok()),
        _ => (entry, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(server: &str, url: &str, variables: &[(&str, &str)]) -> Result<Option<String>, String> {
        let variable =
            |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        proxy_for(&server.parse().unwrap(), url, variable).map(|uri| uri.map(|uri| uri.to_string()))
    }

    #[test]
    fn the_kubeconfig_comes_before_the_environment() {
        let environment = [("HTTPS_PROXY", "http://e:1"), ("NO_PROXY", "*")];
        let found = |server, url, variables| proxy(server, url, variables).unwrap();
        assert_eq!(found("https://h", "http://p:2", &environment).as_deref(), Some("http://p:2/"));
        assert_eq!(found("https://127.0.0.1", "socks5://p:2", &[]).as_deref(), Some("socks5://p:2/"));
        assert_eq!(found("https://h", "", &environment), None);
        assert_eq!(found("https://h", "", &environment[..1]).as_deref(), Some("http://e:1/"));
        assert_eq!(found("http://h", "", &environment[..1]), None, "for another scheme");
        assert_eq!(found("http://h", "", &[("http_proxy", "e:1")]).as_deref(), Some("http://e:1/"));
        assert_eq!(
            found("https://h", "", &[("HTTPS_PROXY", ""), ("https_proxy", "e:1")]).as_deref(),
            Some("http://e:1/")
        );
        for (url, variables) in [("ftp://p", &[][..]), ("p:1", &[]), ("", &[("HTTPS_PROXY", "ftp://p")])] {
            assert!(proxy("https://h", url, variables).is_err(), "{url} {variables:?}");
        }
        assert_eq!(found("https://h", "", &[("HTTPS_PROXY", "ftp://p"), ("NO_PROXY", "h")]), None);
    }

    #[test]
    fn no_proxy_is_read_as_in_go() {
        for (host, port, exceptions, exempt) in [
            ("127.0.0.1", 6443, "", true),
            ("127.9.9.9", 6443, "", true),
            ("::1", 6443, "", true),
            ("localhost", 6443, "", true),
            ("api.test", 6443, "", false),
            ("api.test", 6443, "*", true),
            ("api.test", 6443, "a, *", true),
            ("api.test", 6443, "api.test", true),
            ("API.test.", 6443, "Api.Test", true),
            ("api.test", 6443, "test", true),
            ("api.test", 6443, ".test", true),
            ("api.test", 6443, "*.test", true),
            ("api.test", 6443, ".api.test", false),
            ("api.test", 6443, "*.api.test", false),
            ("api.test", 6443, "pi.test", false),
            ("api.test", 6443, "api.test:6443", true),
            ("api.test", 6443, "api.test:443", false),
            ("192.0.2.1", 6443, "192.0.2.0/24", true),
            ("192.0.2.1", 6443, "192.0.2.1", true),
            ("192.0.2.1", 6443, "192.0.2.1:6443", true),
            ("192.0.2.1", 6443, "192.0.2.1:1", false),
            ("192.0.2.1", 6443, "192.0.3.0/24", false),
            ("fd00::1", 6443, "fd00::/8", true),
            ("fd00::1", 6443, "[fd00::1]:6443", true),
            ("fd00::1", 6443, "fd00::1", true),
            ("192.0.2.1", 6443, ",,", false),
        ] {
            assert_eq!(is_exempt(host, port, exceptions), exempt, "{host}:{port} {exceptions}");
        }
    }
}
