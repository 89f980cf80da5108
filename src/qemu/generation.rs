//! A VM's generation id (`-device vmgenid`): whoever sees another one knows that time has gone back, and that what was
//! to be used once (a key, a seed) may have been used. A VM that moves keeps it; every life from a checkpoint has a
//! new one.

use vmprocess::failure::{Failure, FailureKind};

use super::options::CommandLine;
use super::props::Set;

/// QEMU makes one.
const AUTO: &str = "auto";

/// Has QEMU make a new id, if the VM has one.
///
/// # Errors
/// If the command line cannot be read.
pub(super) fn anew(line: &mut CommandLine) -> Result<(), Failure> {
    for word in &mut line.words {
        if word.name() == "device" && word.value().is_some() {
            let mut props = word.props()?;
            if props.first("driver").as_deref() == Some("vmgenid") {
                props.set("guid", Set::Text(AUTO));
                word.value = Some(props.print());
            }
        }
    }
    Ok(())
}

/// The id that a command line names, as small letters; none if QEMU makes one, or the VM has none.
///
/// # Errors
/// If the command line cannot be read.
pub(super) fn named(line: &CommandLine) -> Result<Option<String>, Failure> {
    for word in line.all("device").filter(|word| word.value().is_some()) {
        let props = word.props()?;
        if props.first("driver").as_deref() == Some("vmgenid") {
            let id = props.get("guid").map(|id| id.to_lowercase());
            return Ok(id.filter(|id| id != AUTO));
        }
    }
    Ok(None)
}

/// Looks at a command line of the user's own for a VM that begins from a checkpoint: it must not say that nothing has
/// happened. What is only a warning, of a VM that takes its own place, is returned.
///
/// # Errors
/// [`FailureKind::Usage`] for a second life with the first one's id.
pub(super) fn check(
    saved: &CommandLine,
    given: &CommandLine,
    second: bool,
) -> Result<Option<String>, Failure> {
    let Some(id) = named(given)?.filter(|id| named(saved).is_ok_and(|was| was.as_ref() == Some(id))) else {
        return Ok(None);
    };
    let text = format!(
        "the command line after -- has the VM generation id that the VM had when it was saved (guid={id}): its guest \
         cannot see that time has gone back, and uses keys and random numbers twice"
    );
    if second {
        let text = format!("{text}; give another one, or guid={AUTO}");
        return Err(Failure::new(FailureKind::Usage, text));
    }
    Ok(Some(format!("{text}; guid={AUTO} makes a new one")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87";

    fn line(device: &str) -> CommandLine {
        CommandLine::parse(&["-m", "1G", "-device", "virtio-rng-pci", "-device", device]).unwrap()
    }

    #[test]
    fn a_new_life_has_a_new_id() {
        for device in [
            format!("vmgenid,guid={},id=gen", ID.to_uppercase()),
            format!("driver=vmgenid,guid={ID}"),
            format!(r#"{{"driver":"vmgenid","guid":"{ID}"}}"#),
        ] {
            let mut line = line(&device);
            assert_eq!(named(&line).unwrap().as_deref(), Some(ID));
            anew(&mut line).unwrap();
            assert_eq!(named(&line).unwrap(), None);
            assert!(line.print()[5].contains("vmgenid") && line.print()[5].contains("auto"), "{line:?}");
        }
        let mut line = line("vmgenid");
        assert_eq!(named(&line).unwrap(), None);
        anew(&mut line).unwrap();
        assert_eq!(line.print()[5], "vmgenid,guid=auto");
    }

    #[test]
    fn the_id_of_the_life_before_is_told() {
        let same = line(&format!("vmgenid,guid={ID}"));
        assert!(check(&same, &same, false).unwrap().unwrap().contains(ID));
        let refused = check(&same, &same, true).unwrap_err();
        assert!(refused.kind == FailureKind::Usage && refused.text.contains("guid=auto"), "{refused}");
        for other in ["vmgenid", "vmgenid,guid=auto", "vmgenid,guid=00000000-0000-0000-0000-000000000001"] {
            assert_eq!(check(&same, &line(other), true).unwrap(), None);
            assert_eq!(check(&line(other), &same, true).unwrap(), None);
        }
    }
}
