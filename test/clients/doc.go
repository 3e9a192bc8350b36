// Package clients holds the tests that drive a served disk with the clients that people use: libnbd's
// tools, qemu's, fio's nbd engine and nbd-client. Every flag and command that an export advertises is
// touched by one of them, and an export that advertises more than is tested fails. It has no code but
// tests.
package clients
