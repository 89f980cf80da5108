//! Who gets in: everybody, or those with a certificate of the CA, by TLS.

use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use migrate::limits::HELLO_LIMIT;
use migrate::tls::{Credentials, Secured, Server, ServerName};
use migrate::{Hello, RefuseKind};
use vmprocess::failure::{Failure, FailureKind, chain};

use super::refusals::Refusals;

/// First byte of a TLS connection, which is no first byte of a hello.
const TLS_HANDSHAKE: u8 = 0x16;
const HELLO: u8 = b'v';
/// Of a TLS greeting that is not wanted: more than it has, so that the answer is not lost with it.
const GREETING_BYTES: usize = 16 << 10;

/// How a daemon knows who may come.
#[derive(Clone, Debug, Default)]
pub struct DoorSettings {
    /// Directory with `ca.crt`, `host.crt` and `host.key`; None: everybody may come.
    pub tls: Option<PathBuf>,
    /// Names of which a peer's certificate must have one; empty: any certificate of the CA will do.
    pub peers: Vec<String>,
}

#[derive(Debug)]
pub(super) struct Door {
    lock: Option<Lock>,
    refusals: Refusals,
}

#[derive(Debug)]
struct Lock {
    dir: PathBuf,
    peers: Vec<ServerName<'static>>,
    /// As it was read last. Certificates are renewed without a restart.
    server: Mutex<Server>,
}

impl Door {
    /// # Errors
    /// If the certificates are of no use.
    pub(super) fn new(settings: &DoorSettings) -> Result<Door, Failure> {
        let lock = settings.tls.as_ref().map(|dir| Lock::new(dir.clone(), &settings.peers)).transpose()?;
        Ok(Door { lock, refusals: Refusals::default() })
    }

    /// Reads what a fresh connection is for, if it may come in. What it says is bounded in time.
    pub(super) fn open(&self, tcp: TcpStream, peer: SocketAddr) -> Option<(TcpStream, Hello)> {
        let entered = match &self.lock {
            Some(lock) => self.unlock(lock, tcp),
            None => enter(tcp),
        };
        entered.map_err(|why| self.refusals.tell(Some(peer.ip()), &why)).ok()
    }

    /// Says why somebody who is in is turned away after all.
    pub(super) fn turned_away(&self, peer: IpAddr, why: &str) {
        self.refusals.tell(Some(peer), why);
    }

    fn unlock(&self, lock: &Lock, mut tcp: TcpStream) -> Result<(TcpStream, Hello), String> {
        if first_byte(&tcp)? == HELLO {
            const WHY: &str = "it speaks no TLS, which this daemon wants: `vmemd migrate --tls DIR`";
            // Read to its end, so that the answer is not lost with the rest of it.
            return Err(match migrate::read_hello(&mut tcp) {
                Ok(_) => {
                    migrate::refuse(&mut tcp, RefuseKind::Other, WHY);
                    WHY.to_owned()
                }
                Err(error) => chain(&error),
            });
        }
        let server = lock.read().unwrap_or_else(|(last, why)| {
            self.refusals.tell(None, &why);
            last
        });
        let mut secured = server.secure(tcp, HELLO_LIMIT).map_err(|error| chain(&error))?;
        let hello = read_hello(&mut secured.stream)?;
        if !lock.welcomes(&secured) {
            const WHY: &str =
                "its certificate has none of the names that this daemon lets come (--allow-peer)";
            migrate::refuse(&mut secured.stream, RefuseKind::Other, WHY);
            return Err(WHY.to_owned());
        }
        Ok((secured.stream, hello))
    }
}

/// Lets everybody in.
fn enter(mut tcp: TcpStream) -> Result<(TcpStream, Hello), String> {
    if first_byte(&tcp)? == TLS_HANDSHAKE {
        const WHY: &str = "it speaks TLS, and this daemon has no certificates: `vmemd serve --tls DIR`";
        let _ = tcp.read(&mut [0; GREETING_BYTES]);
        // Not TLS, by which the peer knows what is the matter.
        migrate::refuse(&mut tcp, RefuseKind::Other, WHY);
        return Err(WHY.to_owned());
    }
    let hello = read_hello(&mut tcp)?;
    Ok((tcp, hello))
}

fn first_byte(tcp: &TcpStream) -> Result<u8, String> {
    let mut first = [0];
    let peeked = tcp.set_read_timeout(Some(HELLO_LIMIT)).and_then(|()| tcp.peek(&mut first));
    match peeked {
        Ok(1) => Ok(first[0]),
        Ok(_) => Err("it left without a word".to_owned()),
        Err(error) => Err(format!("it did not say what it wants: {error}")),
    }
}

fn read_hello(stream: &mut TcpStream) -> Result<Hello, String> {
    migrate::read_hello(stream).map_err(|error| chain(&error))
}

impl Lock {
    fn new(dir: PathBuf, peers: &[String]) -> Result<Lock, Failure> {
        let server = Server::new(&Credentials::read(&dir)?)?;
        let name = |name: &String| {
            let wrong =
                |_| Failure::new(FailureKind::Usage, format!("--allow-peer {name:?} is no name of a host"));
            ServerName::try_from(name.clone()).map_err(wrong)
        };
        Ok(Lock { dir, peers: peers.iter().map(name).collect::<Result<_, _>>()?, server: Mutex::new(server) })
    }

    /// The certificates as they are now; or those of before, with the reason.
    fn read(&self) -> Result<Server, (Server, String)> {
        let read = Credentials::read(&self.dir).and_then(|credentials| Server::new(&credentials));
        let mut last = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        match read {
            Ok(server) => {
                last.clone_from(&server);
                Ok(server)
            }
            Err(error) => {
                let why = format!("new certificates, and those of before are used: {}", chain(&error));
                Err((last.clone(), why))
            }
        }
    }

    fn welcomes(&self, peer: &Secured) -> bool {
        self.peers.is_empty() || self.peers.iter().any(|name| peer.is(name))
    }
}
