//go:build planted

package planted

import "os"

var active = os.Getenv("GRAINDISK_PLANTED")

// Bug tells whether the named bug is active.
func Bug(name string) bool { return active == name }

// Built tells whether this build holds the plants.
const Built = true
