//! Getting a token from a registry's token server (distribution, spec/auth/token.md and oauth.md).
//!
//! These two requests are made here and not by `oci-client`, which knows no identity tokens, reports no status of a token
//! server (so that one in trouble looks like one that refuses), and sends passwords wherever the registry says.

use http_auth::ChallengeRef;
use http_auth::parser::ChallengeParser;
use reqwest::Client;
use reqwest::RequestBuilder;
use reqwest::Response;
use reqwest::StatusCode;
use reqwest::Url;
use reqwest::header::CONTENT_TYPE;
use reqwest::header::WWW_AUTHENTICATE;
use reqwest::redirect::Policy;
use serde::Deserialize;

use crate::image::error::PullError;
use crate::image::registry::USER_AGENT;
use crate::image::registry::auth::RegistryAuth;
use crate::image::registry::failure::Asked;
use crate::image::registry::failure::Cure;
use crate::image::registry::failure::Failure;
use crate::image::registry::transport::Tls;

/// Longest answer of a token server, in bytes.
const MAX_ANSWER: usize = 256 << 10;

/// More is a loop.
const MAX_REDIRECTIONS: usize = 5;

/// Who we are to token servers.
const CLIENT_ID: &str = "kiln";

/// Where tokens are to be had.
#[derive(Debug, PartialEq, Eq)]
struct Challenge {
    realm: Url,
    service: Option<String>,
}

#[derive(Deserialize)]
struct Grant {
    access_token: Option<String>,
    token: Option<String>,
}

/// Asks for a token to read `repository`; `None` if the registry hands out none. `root` is the registry's address.
pub(super) async fn token(
    client: &Client,
    asked: Asked<'_>,
    root: &str,
    repository: &str,
    auth: &RegistryAuth,
) -> Result<Option<String>, Failure> {
    let broken = |reason: &'static str| Failure::new(asked.registry(reason), Cure::Nothing);
    let root = Url::parse(root).map_err(|_| broken("its address is not valid"))?;
    let answer = client.get(root.clone()).send().await.map_err(|error| asked.request(error))?;
    if answer.status().is_server_error() || answer.status() == StatusCode::TOO_MANY_REQUESTS {
        return Err(asked.status(answer.status().as_u16(), ""));
    }
    let mut headers = answer.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    let Some(challenge) = headers.find_map(Challenge::parse) else {
        return match auth {
            RegistryAuth::Identity { .. } => Err(broken("it hands out no tokens, and so takes no identity token")),
            _ => Ok(None),
        };
    };
    // A registry that was reached safely must not make us send a secret in the clear.
    if *auth != RegistryAuth::Anonymous && root.scheme() == "https" && challenge.realm.scheme() != "https" {
        return Err(broken("its token server does not encrypt"));
    }
    let request = challenge.request(client, repository, auth).ok_or_else(|| broken("the request cannot be written"))?;
    let answer = request.send().await.map_err(|error| asked.request(error))?;
    match answer.status().as_u16() {
        200 => {}
        // OAuth has 400 for a token that is not valid.
        400 | 401 | 403 => return Err(asked.unauthorized(Cure::Nothing)),
        status => return Err(asked.status(status, "")),
    }
    let text = body(answer, asked).await?;
    let grant: Grant = serde_json::from_slice(&text).map_err(|_| broken("its token server's answer is not valid"))?;
    let token = grant.token.or(grant.access_token).filter(|token| is_token(token));
    token.map(Some).ok_or_else(|| broken("its token server's answer has no token"))
}

/// Whether it can be part of a header.
fn is_token(token: &str) -> bool {
    !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic())
}

async fn body(mut answer: Response, asked: Asked<'_>) -> Result<Vec<u8>, Failure> {
    let mut text = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(|error| asked.request(error))? {
        text.extend_from_slice(&chunk);
        if text.len() > MAX_ANSWER {
            return Err(Failure::new(asked.registry("its token server does not stop talking"), Cure::Nothing));
        }
    }
    Ok(text)
}

impl Challenge {
    fn parse(header: &str) -> Option<Self> {
        ChallengeParser::new(header).filter_map(Result::ok).find_map(|challenge| Self::of(&challenge))
    }

    fn of(challenge: &ChallengeRef<'_>) -> Option<Self> {
        if !challenge.scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let parameter = |name: &str| {
            let mut all = challenge.params.iter();
            all.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_unescaped())
        };
        let realm = Url::parse(&parameter("realm")?).ok()?;
        Some(Self { realm, service: parameter("service") })
    }

    /// The request for a token. Users and passwords go by the older way, which every token server has.
    fn request(self, client: &Client, repository: &str, auth: &RegistryAuth) -> Option<RequestBuilder> {
        let scope = format!("repository:{repository}:pull");
        let service = self.service.as_deref().map(|service| ("service", service));
        let parameters = service.into_iter().chain([("scope", scope.as_str())]);
        if let RegistryAuth::Identity { token } = auth {
            let grant = [("grant_type", "refresh_token"), ("client_id", CLIENT_ID), ("refresh_token", token)];
            // A form has the encoding of an address's query.
            let form = Url::parse_with_params("form:/", parameters.chain(grant)).ok()?;
            let request = client.post(self.realm).header(CONTENT_TYPE, "application/x-www-form-urlencoded");
            return Some(request.body(form.query().unwrap_or_default().to_owned()));
        }
        let mut realm = self.realm.clone();
        realm.query_pairs_mut().extend_pairs(parameters);
        let request = client.get(realm);
        Some(match auth {
            RegistryAuth::Basic { user, password } => request.basic_auth(user, Some(password)),
            _ => request,
        })
    }
}

/// A client for these requests. It follows redirections within a server only: secrets are for the one that is named.
pub(super) fn client(tls: Option<&Tls>) -> Result<Client, PullError> {
    let within = Policy::custom(|attempt| {
        let is_same = attempt.previous().last().is_some_and(|last| last.origin() == attempt.url().origin());
        if is_same && attempt.previous().len() <= MAX_REDIRECTIONS { attempt.follow() } else { attempt.stop() }
    });
    let mut builder = Client::builder().redirect(within).user_agent(USER_AGENT);
    if let Some(tls) = tls {
        let certificates = tls.certificates()?;
        let certificates = certificates.iter().map(|certificate| reqwest::Certificate::from_der(&certificate.data));
        let certificates: Result<Vec<_>, _> = certificates.collect();
        builder = builder
            .tls_certs_merge(certificates.map_err(|error| PullError::CaCertificate(error.into()))?)
            .danger_accept_invalid_certs(tls.accepts_everything());
    }
    builder.build().map_err(|error| PullError::HttpClient(error.into()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn challenges_are_parsed() {
        let text = r#"Basic realm="x", Bearer realm="https://auth.example/token",service="registry.example""#;
        let challenge = Challenge::parse(text).unwrap();
        assert_eq!(challenge.realm.as_str(), "https://auth.example/token");
        assert_eq!(challenge.service.as_deref(), Some("registry.example"));
        for text in ["", "Basic realm=\"x\"", "Bearer service=\"x\"", "Bearer realm=\"/token\""] {
            assert_eq!(Challenge::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_challenge_is_parsed_or_refused(text in "\\PC{0,100}") {
            let _ = Challenge::parse(&text);
        }
    }
}
