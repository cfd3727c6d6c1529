//! Who to be at a registry.

use std::fmt;

use crate::image::registry::docker_config::DockerConfig;

/// Who to be at the registry. Its `Debug` form hides the secrets.
#[derive(Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegistryAuth {
    /// Nobody. A registry that hands out tokens to everyone is asked for one.
    #[default]
    Anonymous,
    /// User and password, for basic authentication or in exchange for a token.
    Basic {
        /// The user.
        user: String,
        /// The password.
        password: String,
    },
    /// A token that the registry itself takes, shown with every request.
    Bearer {
        /// The token.
        token: String,
    },
    /// A long-lived token that the registry's token server exchanges for the one to show: Docker's "identity token",
    /// OAuth's "refresh token".
    Identity {
        /// The token.
        token: String,
    },
}

impl RegistryAuth {
    /// User and password.
    #[must_use]
    pub fn basic(user: impl Into<String>, password: impl Into<String>) -> Self {
        Self::Basic { user: user.into(), password: password.into() }
    }

    /// A token that the registry itself takes.
    #[must_use]
    pub fn bearer(token: impl Into<String>) -> Self {
        Self::Bearer { token: token.into() }
    }

    /// A token to be exchanged for the one that the registry takes.
    #[must_use]
    pub fn identity(token: impl Into<String>) -> Self {
        Self::Identity { token: token.into() }
    }
}

impl fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("Anonymous"),
            Self::Basic { user, .. } => f.debug_struct("Basic").field("user", user).finish_non_exhaustive(),
            Self::Bearer { .. } => f.debug_struct("Bearer").finish_non_exhaustive(),
            Self::Identity { .. } => f.debug_struct("Identity").finish_non_exhaustive(),
        }
    }
}

/// Where a pull's credentials come from.
#[derive(Clone, Debug)]
pub(in crate::image) enum Credentials {
    /// The caller's word, for the registry of the reference and for no mirror.
    Given(RegistryAuth),
    /// A Docker configuration; by default the user's.
    Docker(DockerConfig),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_shown() {
        let secret = "hunter2";
        for auth in [RegistryAuth::basic("u", secret), RegistryAuth::bearer(secret), RegistryAuth::identity(secret)] {
            assert!(!format!("{auth:?}").contains(secret));
        }
    }
}
