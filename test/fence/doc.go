// Package fence runs two real gateways on one pool and takes it from one to the other: while the first is stopped, while
// it is cut off from its stores, when its tier was put back from an older copy, and by letting go of it.
package fence
