//! The name of one attempt to move a VM.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// 128 random bits, chosen by the source. Written as 32 hexadecimal digits, also in JSON.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct SessionId(pub [u8; 16]);

impl SessionId {
    /// A new name, for one attempt.
    ///
    /// # Errors
    /// If the kernel has no random bytes to give.
    pub fn random() -> std::io::Result<SessionId> {
        let mut bytes = [0; 16];
        crate::outside::random_bytes(&mut bytes)?;
        Ok(SessionId(bytes))
    }

    /// What this session's record checksums are seeded with, so that another session's records do not pass.
    pub(crate) fn seed(self) -> u64 {
        let (low, high) = self.0.split_at(8);
        let half = |bytes: &[u8]| bytes.iter().fold(0_u64, |all, byte| all << 8 | u64::from(*byte));
        half(low) ^ half(high).rotate_left(17)
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({self})")
    }
}

/// A text that is not 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a session is named by 32 hexadecimal digits")]
pub struct BadSessionId;

impl FromStr for SessionId {
    type Err = BadSessionId;

    fn from_str(text: &str) -> Result<Self, BadSessionId> {
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(BadSessionId);
        }
        let mut bytes = [0; 16];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).map_err(|_| BadSessionId)?;
        }
        Ok(SessionId(bytes))
    }
}

impl From<SessionId> for String {
    fn from(session: SessionId) -> String {
        session.to_string()
    }
}

impl TryFrom<String> for SessionId {
    type Error = BadSessionId;

    fn try_from(text: String) -> Result<Self, BadSessionId> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trip() {
        let session = SessionId::random().unwrap();
        assert_eq!(session.to_string().parse(), Ok(session));
        assert_eq!("12".parse::<SessionId>(), Err(BadSessionId));
        assert_eq!("ä".repeat(16).parse::<SessionId>(), Err(BadSessionId));
    }

    #[test]
    fn sessions_differ() {
        assert_ne!(SessionId::random().unwrap(), SessionId::random().unwrap());
    }
}
