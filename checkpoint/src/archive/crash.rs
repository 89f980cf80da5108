use super::steps::Step;
pub(super) fn before(_: Step<'_>) -> std::io::Result<()> {
    Ok(())
}
pub(super) fn after(_: Step<'_>) {}
