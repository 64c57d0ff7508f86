//! pvh
