// Package planted puts known bugs into the gateway, to prove that the crash tests would find them. A
// plant is one line in the production path:
//
//	if planted.Bug("log: acknowledged before it is written") {
//
// Without the build tag "planted" Bug is constant false, so that the compiler leaves nothing of a plant.
// With it at most one bug is active: the one that the environment variable GRAINDISK_PLANTED names.
//
// Catalogue lists the plants. Every one of them must be found by the general generator of pool's
// TestCrash; TestPlanted there runs it and replays the seeds that found them.
package planted

// Plant is one planted bug.
type Plant struct {
	Name string // as given to Bug
	File string // where it is, from the module's root
	What string // what goes wrong
}
