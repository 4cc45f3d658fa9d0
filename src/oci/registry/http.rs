//! Requests to one registry: who asks, whom it is told, and where else it sends one.
//!
//! Credentials go to the registry and to whom it names for tokens, over https, and to nobody else: not where a redirect
//! or an upload leads.

use std::collections::HashMap;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use ureq::http::{HeaderMap, Method, Request, Response, StatusCode, Uri, header};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body, SendBody};

use super::auth::Credentials;
use crate::error::{Error, ErrorKind, Result};

/// Redirects that are followed.
const MOST_REDIRECTS: usize = 5;
/// Bytes of a token or of what a registry says of an error.
const MAX_SAID: u64 = 256 << 10;
/// How long a server may say nothing.
const PATIENCE: Duration = Duration::from_secs(30);

/// What goes with a request. It is read anew where the request is repeated.
pub type Content<'a> = dyn Fn() -> Result<(Box<dyn Read + 'a>, u64)> + 'a;

/// A request.
pub struct Asking<'a> {
    /// GET, HEAD, POST, PUT.
    pub method: Method,
    /// Where; an absolute address.
    pub url: String,
    /// What for: `repository:PATH:pull`, and so on, separated by spaces.
    pub scope: &'a str,
    /// Headers beside those that all have.
    pub headers: Vec<(header::HeaderName, String)>,
    /// What is sent.
    pub content: Option<&'a Content<'a>>,
}

impl<'a> Asking<'a> {
    /// A request without content.
    pub fn new(method: Method, url: String, scope: &'a str) -> Asking<'a> {
        Asking { method, url, scope, headers: Vec::new(), content: None }
    }
}

/// How a registry wants to know who asks.
#[derive(Clone)]
enum Challenge {
    None,
    Basic,
    Bearer { realm: String, service: Option<String> },
}

/// The way to one registry.
pub struct Http {
    agent: Agent,
    /// `https://HOST:PORT`.
    base: String,
    /// Whether what is not https, or whose certificate is not known, is refused.
    strict: bool,
    credentials: Option<Credentials>,
    challenge: Challenge,
    /// Tokens by their scope.
    tokens: Mutex<HashMap<String, String>>,
}

impl Http {
    /// Finds out how the registry at `address` is spoken to. Only where `strict` is not set, it may be without https, or
    /// with a certificate that nobody vouches for.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where it is not reached; [`ErrorKind::Unsupported`] where it is none.
    pub fn new(address: &str, strict: bool, credentials: Option<Credentials>) -> Result<Http> {
        let mut http = Http {
            agent: agent(strict),
            base: format!("https://{address}"),
            strict,
            credentials,
            challenge: Challenge::None,
            tokens: Mutex::default(),
        };
        let answer = match http.ping() {
            Err(secure) if !strict => {
                http.base = format!("http://{address}");
                http.ping().map_err(|_| secure)?
            }
            answer => answer?,
        };
        http.challenge = match answer.status() {
            StatusCode::UNAUTHORIZED => challenge(answer.headers())?,
            status if status.is_success() => Challenge::None,
            status => {
                let text = format!("{}/v2/ answers {status}: no registry is there", http.base);
                return Err(Error::unsupported(text));
            }
        };
        Ok(http)
    }

    /// An address in the registry.
    pub fn url(&self, path: &str) -> String {
        format!("{}/v2/{path}", self.base)
    }

    /// An address that the registry named, which may be without its host.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] where it would go on without https.
    pub fn elsewhere(&self, from: &str, to: &str) -> Result<String> {
        let url = if to.contains("://") {
            to.to_owned()
        } else if to.starts_with('/') {
            format!("{}{to}", origin(from))
        } else {
            return Err(Error::corrupt(format!("{from} leads to '{to}', which is no address")));
        };
        match url.starts_with("https://") || (!self.strict && url.starts_with("http://")) {
            true => Ok(url),
            false => {
                Err(Error::new(ErrorKind::Denied, format!("{from} leads to {url}: not by https")))
            }
        }
    }

    /// Asks, follows redirects, and says who asks where that is wanted. Any status but 401 and redirects is an answer.
    pub fn ask(&self, asking: &Asking<'_>) -> Result<Response<Body>> {
        let answer = self.follow(asking)?;
        if answer.status() != StatusCode::UNAUTHORIZED {
            return Ok(answer);
        }
        // A token may have grown old.
        let old = self.tokens().remove(asking.scope);
        if old.is_some() {
            let answer = self.follow(asking)?;
            if answer.status() != StatusCode::UNAUTHORIZED {
                return Ok(answer);
            }
        }
        let how = match self.credentials {
            Some(_) => "the credentials that are known for it are not taken",
            None => "no credentials are known for it: `podman login` or `docker login` keeps them",
        };
        Err(Error::new(ErrorKind::Denied, format!("{}: access is denied: {how}", asking.url)))
    }

    fn follow(&self, asking: &Asking<'_>) -> Result<Response<Body>> {
        let mut url = asking.url.clone();
        for _ in 0..MOST_REDIRECTS {
            let answer = self.once(asking, &url)?;
            let goes_on = matches!(answer.status().as_u16(), 301 | 302 | 303 | 307 | 308);
            if !goes_on {
                return Ok(answer);
            }
            if !matches!(asking.method, Method::GET | Method::HEAD) {
                return Err(Error::unsupported(format!("{url}: an upload is sent elsewhere")));
            }
            let to = location(answer.headers())
                .ok_or_else(|| Error::corrupt(format!("{url} leads elsewhere and not where")))?;
            url = self.elsewhere(&url, &to)?;
        }
        Err(Error::corrupt(format!("{}: is sent on and on", asking.url)))
    }

    fn once(&self, asking: &Asking<'_>, url: &str) -> Result<Response<Body>> {
        let mut request = Request::builder().method(asking.method.clone()).uri(uri(url)?);
        for (name, value) in &asking.headers {
            request = request.header(name, value);
        }
        if origin(url) == origin(&self.base)
            && let Some(who) = self.authorization(asking.scope)?
        {
            request = request.header(header::AUTHORIZATION, who);
        }
        let failed = |e: ureq::http::Error| Error::invalid(format!("{url}: {e}"));
        let answer = match asking.content {
            Some(content) => {
                let (mut input, len) = content()?;
                let request = request.header(header::CONTENT_LENGTH, len);
                let body = SendBody::from_reader(&mut *input);
                self.agent.run(request.body(body).map_err(failed)?)
            }
            None => self.agent.run(request.body(()).map_err(failed)?),
        };
        answer.map_err(|e| unreached(url, e))
    }

    fn ping(&self) -> Result<Response<Body>> {
        let url = self.url("");
        self.agent.get(&url).call().map_err(|e| unreached(&url, e))
    }

    /// What says who asks.
    fn authorization(&self, scope: &str) -> Result<Option<String>> {
        match (&self.challenge, &self.credentials) {
            (Challenge::Basic, Some(Credentials::User(user, password))) => {
                Ok(Some(basic(user, password)))
            }
            (Challenge::Bearer { realm, service }, _) => {
                let known = self.tokens().get(scope).cloned();
                let token = match known {
                    Some(token) => token,
                    None => {
                        let token = self.token(realm, service.as_deref(), scope)?;
                        self.tokens().insert(scope.to_owned(), token.clone());
                        token
                    }
                };
                Ok(Some(format!("Bearer {token}")))
            }
            _ => Ok(None),
        }
    }

    /// Gets a token (distribution, spec/auth/token.md and oauth.md).
    fn token(&self, realm: &str, service: Option<&str>, scope: &str) -> Result<String> {
        let realm = self.elsewhere(&self.base, realm)?;
        let mut words: Vec<(&str, &str)> = service.map(|s| ("service", s)).into_iter().collect();
        let scopes = scope.split(' ').filter(|s| !s.is_empty());
        let answer = match &self.credentials {
            Some(Credentials::Identity(token)) => {
                words.extend([("client_id", "vdisk"), ("grant_type", "refresh_token")]);
                words.extend([("refresh_token", token.as_str()), ("scope", scope)]);
                let form = words.iter().map(|(k, v)| format!("{k}={}", escaped(v)));
                let form = form.collect::<Vec<_>>().join("&");
                let post = self.agent.post(&realm);
                post.content_type("application/x-www-form-urlencoded").send(form.as_str())
            }
            other => {
                words.extend(scopes.map(|scope| ("scope", scope)));
                let query = words.iter().map(|(k, v)| format!("{k}={}", escaped(v)));
                let joint = if realm.contains('?') { '&' } else { '?' };
                let url = format!("{realm}{joint}{}", query.collect::<Vec<_>>().join("&"));
                let mut get = self.agent.get(&url);
                if let Some(Credentials::User(user, password)) = other {
                    get = get.header(header::AUTHORIZATION, basic(user, password));
                }
                get.call()
            }
        };
        let mut answer = answer.map_err(|e| unreached(&realm, e))?;
        if !answer.status().is_success() {
            let status = answer.status();
            let text = format!("{realm} gives no token: {status}{}", said(&mut answer));
            return Err(Error::new(ErrorKind::Denied, text));
        }
        let said: Value = serde_json::from_slice(&bounded(&mut answer, MAX_SAID)?)
            .map_err(|e| Error::corrupt(format!("{realm}: the token cannot be read: {e}")))?;
        let word = |key| said.get(key).and_then(Value::as_str);
        let token = word("token").or(word("access_token")).filter(|t| is_header(t));
        token.map(str::to_owned).ok_or_else(|| Error::corrupt(format!("{realm} gives no token")))
    }

    fn tokens(&self) -> std::sync::MutexGuard<'_, HashMap<String, String>> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn agent(strict: bool) -> Agent {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = TlsConfig::builder()
        .root_certs(RootCerts::PlatformVerifier)
        .unversioned_rustls_crypto_provider(provider)
        .disable_verification(!strict);
    let config = Agent::config_builder()
        .tls_config(tls.build())
        .https_only(strict)
        .http_status_as_error(false)
        .max_redirects(0)
        .user_agent(concat!("vdisk/", env!("CARGO_PKG_VERSION")))
        .timeout_resolve(Some(PATIENCE))
        .timeout_connect(Some(PATIENCE))
        .timeout_per_read(Some(PATIENCE))
        .timeout_per_write(Some(PATIENCE));
    config.build().new_agent()
}

/// What a registry sends, of `most` bytes.
///
/// # Errors
/// [`ErrorKind::Corrupt`] where it is more.
pub fn bounded(answer: &mut Response<Body>, most: u64) -> Result<Vec<u8>> {
    let mut raw = Vec::new();
    let mut input = answer.body_mut().with_config().limit(u64::MAX).reader().take(most + 1);
    input.read_to_end(&mut raw).map_err(|e| Error::io("the registry's answer broke off", e))?;
    match raw.len() as u64 <= most {
        true => Ok(raw),
        false => Err(Error::corrupt("the registry's answer is too long to be believed")),
    }
}

/// What a registry says of an error, for messages.
pub fn said(answer: &mut Response<Body>) -> String {
    let raw = bounded(answer, MAX_SAID).unwrap_or_default();
    let said: Option<Value> = serde_json::from_slice(&raw).ok();
    let errors = said.as_ref().and_then(|s| s.get("errors")).and_then(Value::as_array);
    let one = |error: &Value| {
        let word = |key| error.get(key).and_then(Value::as_str);
        word("message").or(word("code")).map(|w| w.chars().filter(|c| !c.is_control()).collect())
    };
    let all: Vec<String> = errors.into_iter().flatten().filter_map(one).collect();
    if all.is_empty() { String::new() } else { format!(": {}", all.join(", ")) }
}

/// Where an answer leads.
pub fn location(headers: &HeaderMap) -> Option<String> {
    Some(headers.get(header::LOCATION)?.to_str().ok()?.to_owned())
}

/// A part of an address, written so that it says only itself.
pub fn escaped(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                out.push(byte as char)
            }
            _ => out += &format!("%{byte:02X}"),
        }
    }
    out
}

/// `https://HOST:PORT` of an address.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let rest = url.get(host..).unwrap_or_default();
    let end = rest.find(['/', '?', '#']).map_or(url.len(), |at| host + at);
    let origin = url.get(..end).unwrap_or(url);
    // The port that is meant without one.
    match origin.starts_with("https://") {
        true => origin.strip_suffix(":443").unwrap_or(origin),
        false => origin.strip_suffix(":80").unwrap_or(origin),
    }
}

fn uri(url: &str) -> Result<Uri> {
    url.parse().map_err(|e| Error::corrupt(format!("'{url}' is no address: {e}")))
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

fn is_header(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic())
}

fn unreached(url: &str, error: ureq::Error) -> Error {
    match error {
        ureq::Error::Io(e) => match e.downcast::<Error>() {
            // What went wrong with what was to be sent.
            Ok(ours) => ours,
            Err(e) => Error::io(format!("{url} cannot be reached"), e),
        },
        e => Error::new(ErrorKind::Io, format!("{url} cannot be reached: {e}")),
    }
}

fn challenge(headers: &HeaderMap) -> Result<Challenge> {
    let all = headers.get_all(header::WWW_AUTHENTICATE).iter().filter_map(|h| h.to_str().ok());
    let mut known = Challenge::None;
    for text in all {
        let (scheme, rest) = text.split_once(' ').unwrap_or((text, ""));
        if scheme.eq_ignore_ascii_case("bearer") {
            let words = parameters(rest);
            let realm = words.iter().find(|(k, _)| k == "realm").map(|(_, v)| v.clone());
            let realm =
                realm.ok_or_else(|| Error::corrupt("the registry names nobody for tokens"))?;
            let service = words.into_iter().find(|(k, _)| k == "service").map(|(_, v)| v);
            return Ok(Challenge::Bearer { realm, service });
        }
        if scheme.eq_ignore_ascii_case("basic") {
            known = Challenge::Basic;
        }
    }
    match known {
        Challenge::None => {
            Err(Error::unsupported("the registry asks for credentials of a kind that is not known"))
        }
        known => Ok(known),
    }
}

/// `a="b",c=d` (RFC 9110, 11.2).
fn parameters(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some((key, behind)) = rest.split_once('=') {
        let key = key.trim_matches([' ', ',']).to_ascii_lowercase();
        let value;
        if let Some(quoted) = behind.strip_prefix('"') {
            let mut out = String::new();
            let mut chars = quoted.char_indices();
            let mut end = quoted.len();
            while let Some((at, c)) = chars.next() {
                match c {
                    '\\' => out.extend(chars.next().map(|(_, c)| c)),
                    '"' => {
                        end = at + 1;
                        break;
                    }
                    c => out.push(c),
                }
            }
            value = out;
            rest = quoted.get(end..).unwrap_or_default();
        } else {
            let end = behind.find(',').unwrap_or(behind.len());
            value = behind.get(..end).unwrap_or_default().trim().to_owned();
            rest = behind.get(end..).unwrap_or_default();
        }
        found.push((key, value));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_registry_wants_to_know_is_read() {
        let text = r#"realm="https://a.b/t?x=\"1",service="reg, istry", scope=x"#;
        let found = parameters(text);
        let found: Vec<(&str, &str)> = found.iter().map(|(k, v)| (&k[..], &v[..])).collect();
        let right = [("realm", "https://a.b/t?x=\"1"), ("service", "reg, istry"), ("scope", "x")];
        assert_eq!(found, right);
        let mut headers = HeaderMap::new();
        assert!(challenge(&headers).is_err());
        headers.append(header::WWW_AUTHENTICATE, "Basic realm=\"x\"".parse().unwrap());
        assert!(matches!(challenge(&headers), Ok(Challenge::Basic)));
        headers.append(header::WWW_AUTHENTICATE, "Bearer realm=\"https://x\"".parse().unwrap());
        assert!(matches!(challenge(&headers), Ok(Challenge::Bearer { service: None, .. })));
    }

    #[test]
    fn an_address_has_an_origin_and_leads_on_by_https_alone() {
        assert_eq!(origin("https://a:1/b?c"), "https://a:1");
        assert_eq!(origin("https://a"), "https://a");
        assert_eq!(origin("https://a:443/b"), "https://a");
        let mut http = Http {
            agent: agent(true),
            base: "https://a".to_owned(),
            strict: true,
            credentials: None,
            challenge: Challenge::None,
            tokens: Mutex::default(),
        };
        assert_eq!(http.elsewhere("https://a/b", "/c").unwrap(), "https://a/c");
        assert_eq!(http.elsewhere("https://a/b", "https://d/c").unwrap(), "https://d/c");
        for bad in ["http://a/c", "ftp://a", "c", "file:///etc/passwd"] {
            assert!(http.elsewhere("https://a/b", bad).is_err(), "{bad}");
        }
        http.strict = false;
        assert!(http.elsewhere("https://a/b", "http://a/c").is_ok());
    }
}
