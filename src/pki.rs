//! A small CA for a test set-up: `vmemd pki`. Its private key is a file; where more is at stake, certificates come from
//! a CA that is run as one.
//!
//! ```text
//!   DIR/ca.key                          the CA: keep it off the hosts
//!   DIR/ca.crt
//!   DIR/HOST/{ca.crt,host.crt,host.key} what HOST gets, for `serve --tls` and `migrate --tls`
//! ```

use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use migrate::tls::{Credentials, Server, ServerName};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};
use vmprocess::failure::{Failure, FailureKind};

/// How long the CA lives at least: longer than its hosts' certificates.
const CA_DAYS: u32 = 3650;
/// Clocks that are a little behind take a new certificate all the same.
const CLOCK_SKEW: Duration = Duration::from_secs(300);
const SECRET: u32 = 0o600;
const PUBLIC: u32 = 0o644;

/// The certificates that are wanted.
#[derive(Clone, Debug)]
pub struct PkiSettings {
    pub dir: PathBuf,
    /// One for each host: its names and addresses, with commas between them. The first names its directory.
    pub hosts: Vec<String>,
    pub days: u32,
}

/// Makes a CA, and its hosts' certificates.
///
/// # Errors
/// If there is one already, or a file cannot be written.
pub fn init(settings: &PkiSettings) -> Result<(), Failure> {
    let hosts = hosts(settings)?;
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = ca_params(&key);
    lasting(&mut params, settings.days.max(CA_DAYS));
    let certificate = params.self_signed(&key).map_err(failed)?;
    make_dir(&settings.dir, true)?;
    write(&settings.dir.join("ca.key"), &key.serialize_pem(), SECRET)?;
    write(&settings.dir.join("ca.crt"), &certificate.pem(), PUBLIC)?;
    issue_all(settings, &hosts, key, &certificate.pem())
}

/// Makes certificates of a CA that [`init`] has made.
///
/// # Errors
/// If it has not, a host has one already, or a file cannot be written.
pub fn issue(settings: &PkiSettings) -> Result<(), Failure> {
    let hosts = hosts(settings)?;
    let read = |name: &str| {
        let path = settings.dir.join(name);
        let fail = |error| {
            Failure::io(format!("cannot read {} (`vmemd pki init` makes it)", path.display()), &error)
        };
        fs::read_to_string(&path).map_err(fail)
    };
    let key = KeyPair::from_pem(&read("ca.key")?).map_err(failed)?;
    issue_all(settings, &hosts, key, &read("ca.crt")?)
}

fn issue_all(
    settings: &PkiSettings,
    hosts: &[Vec<String>],
    ca_key: KeyPair,
    ca: &str,
) -> Result<(), Failure> {
    let issuer = Issuer::new(ca_params(&ca_key), ca_key);
    for names in hosts {
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = CertificateParams::new(names.clone()).map_err(failed)?;
        params.distinguished_name = called(&names[0]);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // A host is at times the source of a migration and at times the target.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        lasting(&mut params, settings.days);
        let cert = params.signed_by(&key, &issuer).map_err(failed)?.pem();
        let made = Credentials { ca: ca.to_owned(), cert, key: key.serialize_pem() };
        // A CA of another kind would have another name than the one that was signed with.
        Server::new(&made).map_err(|error| {
            let text = format!("{} is not a CA of `vmemd pki init`: {error}", settings.dir.display());
            Failure::new(FailureKind::Usage, text)
        })?;
        let dir = settings.dir.join(&names[0]);
        make_dir(&dir, false)?;
        write(&dir.join("ca.crt"), &made.ca, PUBLIC)?;
        write(&dir.join("host.crt"), &made.cert, PUBLIC)?;
        write(&dir.join("host.key"), &made.key, SECRET)?;
    }
    Ok(())
}

/// The names of each host, which also have to be fit for a file name.
fn hosts(settings: &PkiSettings) -> Result<Vec<Vec<String>>, Failure> {
    let names = |host: &String| host.split(',').map(checked).collect();
    settings.hosts.iter().map(names).collect()
}

fn checked(name: &str) -> Result<String, Failure> {
    match ServerName::try_from(name) {
        Ok(_) => Ok(name.to_owned()),
        Err(_) => Err(Failure::new(
            FailureKind::Usage,
            format!("--host {name:?} is no name or address of a host: as in --host a.example,192.0.2.1"),
        )),
    }
}

/// What is known of the CA by its key, so that no certificate has to be read in order to sign.
fn ca_params(key: &KeyPair) -> CertificateParams {
    let mut params = CertificateParams::default();
    let print = xxhash_rust::xxh3::xxh3_64(key.public_key_raw());
    params.distinguished_name = called(&format!("vmemd test CA {print:016x}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn called(name: &str) -> DistinguishedName {
    let mut names = DistinguishedName::new();
    names.push(DnType::CommonName, name);
    names
}

fn lasting(params: &mut CertificateParams, days: u32) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let epoch = date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(CLOCK_SKEW);
    params.not_after = epoch + now + Duration::from_secs(u64::from(days) * 24 * 3600);
}

fn failed(error: rcgen::Error) -> Failure {
    Failure::new(FailureKind::Other, format!("cannot make a certificate: {error}"))
}

fn make_dir(path: &Path, may_exist: bool) -> Result<(), Failure> {
    fs::DirBuilder::new().recursive(may_exist).mode(0o700).create(path).map_err(|error| exists(path, &error))
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), Failure> {
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(|error| exists(path, &error))
}

fn exists(path: &Path, error: &std::io::Error) -> Failure {
    let path = path.display();
    if error.kind() == std::io::ErrorKind::AlreadyExists {
        return Failure::new(
            FailureKind::Usage,
            format!(
                "{path} is there already and is not overwritten: move it away, or choose another directory"
            ),
        );
    }
    Failure::io(format!("cannot make {path}"), error)
}
