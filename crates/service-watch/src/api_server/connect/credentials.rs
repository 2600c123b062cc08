//! What each request to the API server is authenticated with.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use http::{HeaderName, HeaderValue};

use super::exec::Program;
use super::kubeconfig::{AuthProvider, Cluster, User};
use super::server_url::basic;
use super::tls::ClientCertificate;

/// The credentials of a user. They may change while the agent runs, without a new client.
pub(super) struct Credentials {
    source: CredentialSource,
    /// The user that the requests are made for, if it is another.
    impersonation: Vec<(HeaderName, HeaderValue)>,
}

enum CredentialSource {
    /// None, or a client certificate that is part of the connection.
    Connection,
    Header(HeaderValue),
    TokenFile(TokenFile),
    Program(Program),
}

/// A file with a token, which may be replaced at any time.
struct TokenFile {
    path: PathBuf,
    /// The last usable token, for as long as the file has none.
    last: Mutex<Option<HeaderValue>>,
}

impl Credentials {
    /// The credentials of a kubeconfig's user; `from_url` is the `Authorization` of the server's URL.
    pub(super) fn new(
        cluster: &Cluster,
        user: &User,
        from_url: Option<HeaderValue>,
        certificate: &ClientCertificate,
    ) -> Result<Self, String> {
        let has_password = !user.username.is_empty() || !user.password.is_empty();
        let has_token_file = !user.token_file.as_os_str().is_empty();
        if has_password && (!user.token.is_empty() || has_token_file) {
            return Err("the user has a password and a token: keep one of them".to_owned());
        }
        if user.exec.is_some() && user.auth_provider.is_some() {
            return Err("the user has exec and auth-provider: keep exec".to_owned());
        }
        let inline = if user.token.is_empty() { None } else { Some(bearer(&user.token, "the user's token")?) };
        // What comes first counts, as in client-go: a token file before a token, and either before a program.
        let source = if has_token_file {
            CredentialSource::TokenFile(TokenFile::new(&user.token_file, inline)?)
        } else if let Some(token) = inline {
            CredentialSource::Header(token)
        } else if has_password {
            let header = basic(user.username.as_bytes(), user.password.as_bytes());
            CredentialSource::Header(header.ok_or("the user's name and password fit in no header: use a token")?)
        } else if let Some(exec) = &user.exec {
            CredentialSource::Program(Program::new(exec, cluster, certificate.clone())?)
        } else if let Some(provider) = &user.auth_provider {
            CredentialSource::Header(token_of_provider(provider)?)
        } else {
            from_url.map_or(CredentialSource::Connection, CredentialSource::Header)
        };
        Ok(Self { source, impersonation: impersonation(user)? })
    }

    /// The credentials of a pod's service account.
    pub(super) fn of_token_file(path: &Path) -> Result<Self, String> {
        let source = CredentialSource::TokenFile(TokenFile::new(path, None)?);
        Ok(Self { source, impersonation: Vec::new() })
    }

    /// The headers for a request. An error says why there are none yet, and what to do.
    pub(super) async fn headers(&self) -> Result<Vec<(HeaderName, HeaderValue)>, String> {
        let mut headers = self.impersonation.clone();
        let authorization = match &self.source {
            CredentialSource::Connection => None,
            CredentialSource::Header(value) => Some(value.clone()),
            CredentialSource::TokenFile(file) => Some(file.current()?),
            CredentialSource::Program(program) => {
                let credential = program.credential().await?;
                if credential.has_certificate {
                    // A connection keeps the certificate that it began with, which may expire.
                    headers.push((http::header::CONNECTION, HeaderValue::from_static("close")));
                }
                credential.authorization.clone()
            }
        };
        headers.extend(authorization.map(|value| (http::header::AUTHORIZATION, value)));
        Ok(headers)
    }

    /// The API server did not accept the credentials of a request: a program is asked for others.
    pub(super) fn refused(&self) {
        if let CredentialSource::Program(program) = &self.source {
            program.refused();
        }
    }
}

impl TokenFile {
    fn new(path: &Path, inline: Option<HeaderValue>) -> Result<Self, String> {
        let file = Self { path: path.to_owned(), last: Mutex::new(inline) };
        file.current()?;
        Ok(file)
    }

    /// Reads the file, which is small, for each of the few requests. If it has no token, the last known one stays.
    fn current(&self) -> Result<HeaderValue, String> {
        let path = self.path.display();
        let read = std::fs::read_to_string(&self.path)
            .map_err(|error| format!("cannot read the token file {path}: {error}"))
            .and_then(|text| bearer(&text, &format!("the token of the file {path}")));
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match read {
            Ok(token) => {
                *last = Some(token.clone());
                Ok(token)
            }
            Err(problem) => last.clone().ok_or(problem),
        }
    }
}

/// The header for a token. White space around it is no part of it. `name` is used in the error, which does not have
/// the token.
pub(super) fn bearer(token: &str, name: &str) -> Result<HeaderValue, String> {
    let token = token.trim();
    if token.is_empty() {
        return Err(format!("{name} is empty: write the token there"));
    }
    let usable = token.bytes().all(|byte| (b' '..0x7f).contains(&byte) || byte >= 0x80);
    let value = usable.then(|| HeaderValue::try_from(format!("Bearer {token}")).ok()).flatten();
    let mut value = value.ok_or_else(|| {
        format!(
            "{name} has characters that no token has, such as a line break or another control character: remove them"
        )
    })?;
    value.set_sensitive(true);
    Ok(value)
}

/// Of the plugins that client-go once had built in only the one for OIDC is left.
fn token_of_provider(provider: &AuthProvider) -> Result<HeaderValue, String> {
    let name = &provider.name;
    let token = ["id-token", "access-token"].into_iter().find_map(|key| Some((key, provider.config.get(key)?)));
    match token {
        Some((key, token)) => bearer(token, &format!("the user's {key}")),
        None => Err(format!(
            "the auth-provider {name:?} has no id-token, and is not able to get one here: use exec, a token or a client certificate"
        )),
    }
}

fn impersonation(user: &User) -> Result<Vec<(HeaderName, HeaderValue)>, String> {
    let mut headers = Vec::new();
    let mut push = |name: &str, value: &str| {
        let header = HeaderName::try_from(name).ok().zip(HeaderValue::from_str(value).ok());
        let header = header.ok_or_else(|| format!("the user has fields `as` that fit in no header: {name:?}"))?;
        headers.push(header);
        Ok::<(), String>(())
    };
    if user.impersonate.is_empty() {
        let others = user.as_uid.is_empty() && user.as_groups.is_empty() && user.as_user_extra.is_empty();
        return if others {
            Ok(headers)
        } else {
            Err("the user has `as-…` without `as`: add the user name".to_owned())
        };
    }
    push("impersonate-user", &user.impersonate)?;
    if !user.as_uid.is_empty() {
        push("impersonate-uid", &user.as_uid)?;
    }
    for group in &user.as_groups {
        push("impersonate-group", group)?;
    }
    for (key, values) in &user.as_user_extra {
        let key: String = percent_encoding::utf8_percent_encode(key, EXTRA_KEY).collect();
        for value in values {
            push(&format!("impersonate-extra-{key}"), value)?;
        }
    }
    Ok(headers)
}

/// What is encoded in the name of an extra field: all that a header's name cannot have.
const EXTRA_KEY: &percent_encoding::AsciiSet = &percent_encoding::NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'!')
    .remove(b'#')
    .remove(b'$')
    .remove(b'&')
    .remove(b'\'')
    .remove(b'*')
    .remove(b'+')
    .remove(b'^')
    .remove(b'`')
    .remove(b'|')
    .remove(b'~');

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_around_a_token_is_no_part_of_it() {
        for token in ["secret", "secret\n", "\r\nsecret\r\n", " secret\t"] {
            assert_eq!(bearer(token, "it").unwrap(), "Bearer secret", "{token:?}");
        }
        for token in ["", "\n", "sec\nret", "sec\0ret", "sec\tret", "sec\x7fret"] {
            let problem = bearer(token, "it").unwrap_err();
            assert!(problem.starts_with("it ") && !problem.contains("ret\n"), "{token:?}: {problem}");
        }
    }
}
