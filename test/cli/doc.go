// Package cli gives the real gateway what it must refuse, and reads what it says: an exit code that scripts
// can rely on, and one line that names the thing, its value and the next step. Nothing may have changed.
package cli
