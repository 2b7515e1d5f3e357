//! gradwire-bench: measures gradwire against its peers and the machine's limits.
fn main() {}
