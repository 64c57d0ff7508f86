//! The pure half of exitmeter.
