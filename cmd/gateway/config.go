package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/spf13/cobra"

	"graindisk/config"
)

func newConfigCmd(a *app) *cobra.Command {
	return newGroupCmd("config", "Check or show the configuration",
		newConfigCheckCmd(a),
		newConfigShowCmd(a),
	)
}

func newConfigCheckCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Print every problem of the configuration, or what it promises",
		Long: `Print every problem of the configuration at once, each with its line, and exit with 2; or, if there
is none, what each pool survives. No target is asked for anything.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return runConfigCheck(a) },
	}
}

// configReport is what "config check --json" prints.
type configReport struct {
	OK       bool                  `json:"ok"`
	Source   string                `json:"source"`
	Problems []config.Problem      `json:"problems"`
	Pools    map[string]poolReport `json:"pools,omitempty"`
}

type poolReport struct {
	Stripe   string `json:"stripe"`
	Targets  int    `json:"targets"`  // witnesses included
	Survives int    `json:"survives"` // lost targets
}

func runConfigCheck(a *app) error {
	c, err := a.loadConfig(nil)
	var ps *config.Problems
	switch {
	case errors.As(err, &ps):
		return printProblems(a, ps)
	case err != nil:
		return err
	}
	r := configReport{OK: true, Source: c.Source, Problems: []config.Problem{}, Pools: map[string]poolReport{}}
	for name, p := range c.Pools {
		r.Pools[name] = poolReport{p.Stripe.String(), len(p.Targets), p.Survives()}
	}
	if a.json {
		return a.printJSON(r)
	}
	fmt.Fprintf(a.stdout, "%s: no problems\n", r.Source)
	for _, name := range slices.Sorted(maps.Keys(r.Pools)) {
		p := r.Pools[name]
		fmt.Fprintf(a.stdout, "pool %s: %s, targets: %d, may be lost without loss of data or service: %d\n", name, p.Stripe, p.Targets, p.Survives)
	}
	return nil
}

func printProblems(a *app, ps *config.Problems) error {
	if a.json {
		if err := a.printJSON(configReport{Source: ps.Source, Problems: ps.List}); err != nil {
			return err
		}
		return &reportedError{ps}
	}
	for _, p := range ps.List {
		fmt.Fprintln(a.stdout, p)
	}
	return usagef("configuration %s: problems: %d", ps.Source, len(ps.List))
}

func newConfigShowCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "show",
		Short: "Print the configuration in effect, with defaults and environment, without secrets",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			c, err := a.loadConfig(nil)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(c)
			}
			text, err := c.YAML()
			if err != nil {
				return err
			}
			_, err = a.stdout.Write(text)
			return err
		},
	}
}
