//! gradwire-ps: a sharded parameter server and its client.
