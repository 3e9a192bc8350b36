package main

import (
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/KimMachineGun/automemlimit/memlimit"

	"graindisk/config"
)

// limitMemory tells the garbage collector of a control group's limit, so that it works harder rather than
// have the kernel kill the process. Beside the heap there is the cache of blocks in RAM, and a fifth is left for
// what the runtime and the kernel take. GOMEMLIMIT, if set, stands.
func limitMemory(cfg *config.Config, log *slog.Logger) {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	limit, err := memlimit.FromCgroup()
	if err != nil || limit == 0 || limit > 1<<50 {
		return // there is none
	}
	heap := int64(limit)*4/5 - int64(cfg.Tier.RAM)
	if heap < int64(limit)/4 {
		log.Warn("tier.ram is large for the control group's memory", "ram", cfg.Tier.RAM.String(), "limit_bytes", limit)
		heap = int64(limit) / 4
	}
	debug.SetMemoryLimit(heap)
	log.Info("memory limited by the control group", "limit_bytes", limit, "heap_bytes", heap)
}
