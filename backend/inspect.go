package backend

import "context"

// Finding is something about a place for objects that its owner should know.
type Finding struct {
	Name      string `json:"name"`      // "versioning", "object lock", "lifecycle", …
	Dangerous bool   `json:"dangerous"` // objects may vanish, or stay and cost for ever
	Text      string `json:"text"`
}

// Inspector is a Store that can look at how its bucket or container is set up.
type Inspector interface {
	// Inspect asks for the settings. What it may not see is a Finding, not an error.
	Inspect(ctx context.Context) ([]Finding, error)
}
