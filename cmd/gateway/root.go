package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"graindisk/config"
)

// app is what all commands share: the streams and the global flags.
type app struct {
	stdout, stderr io.Writer
	configFile     string
	dataDir        string
	json           bool
	started        bool // the command line was right and the command is running
}

func newRootCmd(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:           "gateway",
		Short:         "Virtual disks that are fast locally and kept in blob stores",
		SilenceErrors: true,
		SilenceUsage:  true,
		// No command below may have a hook of this name: it would replace this one.
		PersistentPreRun: func(*cobra.Command, []string) { a.started = true },
	}
	cmd.SetOut(a.stdout)
	cmd.SetErr(a.stderr)
	f := cmd.PersistentFlags()
	f.StringVar(&a.configFile, "config", "", "configuration file (default $GATEWAY_CONFIG)")
	f.StringVar(&a.dataDir, "data", "", "data directory of the embedded default, which needs no file (default $GATEWAY_DATA)")
	f.BoolVar(&a.json, "json", false, "print results and errors as JSON on stdout")
	cmd.AddCommand(
		newServeCmd(a),
		newDiskCmd(a),
		newPoolCmd(a),
		newJobCmd(a),
		newAttachCmd(a),
		newDetachCmd(a),
		newInspectCmd(a),
		newExtractCmd(a),
		newConfigCmd(a),
		newVersionCmd(a),
		newCheckExportCmd(a),
	)
	return cmd
}

// newGroupCmd is a command that only holds others; alone it is a usage error.
func newGroupCmd(use, short string, cmds ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use:   use,
		Short: short,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usagef("%s needs a command; see \"%s --help\"", cmd.CommandPath(), cmd.CommandPath())
		},
	}
	cmd.AddCommand(cmds...)
	return cmd
}

// loadConfig reads the configuration that the global flags or the environment name. disks are the
// values of --disk, each NAME=SIZE; they go with the embedded default only.
func (a *app) loadConfig(disks []string) (*config.Config, error) {
	file, data := a.configFile, a.dataDir
	if file != "" && data != "" {
		return nil, usagef("--config and --data exclude each other: a file names its own data directory")
	}
	if file == "" && data == "" {
		file, data = os.Getenv("GATEWAY_CONFIG"), os.Getenv("GATEWAY_DATA")
	}
	switch {
	case file != "" && len(disks) > 0:
		return nil, usagef("--disk goes with --data; with a configuration file, list the disk there")
	case file != "":
		return config.Load(file)
	case data == "":
		return nil, usagef("no configuration: give --config FILE or --data DIR, or set GATEWAY_CONFIG or GATEWAY_DATA")
	}
	var list []config.Disk
	for _, s := range disks {
		d, err := config.ParseDisk(s)
		if err != nil {
			return nil, usagef("--disk: %w", err)
		}
		list = append(list, d)
	}
	return config.Embedded(data, list)
}

// printJSON prints v on stdout, indented.
func (a *app) printJSON(v any) error {
	e := json.NewEncoder(a.stdout)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}
