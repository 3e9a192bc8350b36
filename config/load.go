package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/go-viper/mapstructure/v2"
	"github.com/spf13/viper"
	"go.yaml.in/yaml/v3"
)

const envPrefix = "GATEWAY"

// Load reads the YAML file at path and the environment. What is wrong with them comes as one
// *Problems; any other error means the file could not be read.
func Load(path string) (*Config, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return load(text, path, os.Environ(), false)
}

// Embedded is the configuration when there is no file: pool "main", 2+1 over the directories a, b and
// c below dir/targets, with the given disks. The environment applies, but for GATEWAY_DATA.
func Embedded(dir string, disks []Disk) (*Config, error) {
	if dir == "" {
		return nil, errors.New("embedded default: the data directory is empty")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("embedded default: %w", err)
	}
	p := Pool{Stripe: Stripe{Data: 2, Parity: 1}, MaxDirtyAge: maxDirtyAgeDefault, Beat: beatDefault, Watch: watchDefault, Compression: CompressionNone,
		ScrubPeriod: scrubPeriodDefault, ScrubRate: scrubRateDefault, Disks: disks}
	for _, name := range []string{"a", "b", "c"} {
		p.Targets = append(p.Targets, Target{Name: name, Local: &Local{Dir: filepath.Join(dir, "targets", name)}})
	}
	text, err := yaml.Marshal(map[string]any{"data": dir, "pools": map[string]Pool{"main": p}})
	if err != nil {
		return nil, fmt.Errorf("embedded default: %w", err)
	}
	env := slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, envPrefix+"_DATA=") })
	return load(text, "embedded default", env, true)
}

// load makes a Config of a YAML text and environ, each "NAME=value".
func load(text []byte, source string, environ []string, embedded bool) (*Config, error) {
	w := &walker{collector: newCollector(), leaves: map[string][]leaf{}}
	root, err := parse(text)
	if err != nil {
		w.add(*err)
		return nil, w.err(source)
	}
	w.walk(root, reflect.TypeFor[Config](), place{env: []string{envPrefix}}, "")
	if embedded {
		clear(w.lines) // no user wrote that text
		for i := range w.list {
			w.list[i].Line = 0
		}
	}

	c := &Config{Embedded: embedded, Source: source}
	if err := decode(root, w.environment(environ), c); err != nil {
		return nil, fmt.Errorf("configuration %s: %w", source, err)
	}
	c.derive()
	c.check(w.collector)
	if c.Tier.Size == 0 && len(w.list) == 0 {
		var err error
		if c.Tier.Size, err = c.defaultTierSize(); err != nil {
			w.add(Problem{Key: "tier.size", Msg: err.Error(), Hint: "set tier.size"})
		}
	}
	if err := w.err(source); err != nil {
		return nil, err
	}
	return c, nil
}

// parse returns the top mapping of the one YAML document in text; an empty text is an empty mapping.
func parse(text []byte) (*yaml.Node, *Problem) {
	var doc, second yaml.Node
	d := yaml.NewDecoder(bytes.NewReader(text))
	switch err := d.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return &yaml.Node{Kind: yaml.MappingNode}, nil
	case err != nil:
		return nil, syntaxProblem(err)
	}
	switch err := d.Decode(&second); {
	case errors.Is(err, io.EOF):
	case err != nil:
		return nil, syntaxProblem(err)
	default:
		return nil, &Problem{Line: second.Line, Msg: "a second YAML document; only one is read"}
	}
	root := doc.Content[0]
	if root.ShortTag() == "!!null" {
		return &yaml.Node{Kind: yaml.MappingNode}, nil
	}
	if root.Kind != yaml.MappingNode {
		return nil, &Problem{Line: root.Line, Msg: "must be a mapping, not a " + kindName(root)}
	}
	return root, nil
}

// syntaxProblem takes the line out of a YAML error.
func syntaxProblem(err error) *Problem {
	msg := strings.TrimPrefix(err.Error(), "yaml: ")
	var line int
	if _, serr := fmt.Sscanf(msg, "line %d:", &line); serr == nil {
		_, msg, _ = strings.Cut(msg, ": ")
	}
	return &Problem{Line: line, Msg: "not YAML: " + msg}
}

// environment picks the variables that set a key, by their viper key, and reports those that set none
// or not properly.
func (w *walker) environment(environ []string) map[string]string {
	type setting struct{ name, key string }
	var set []setting
	for _, kv := range slices.Sorted(slices.Values(environ)) {
		name, value, _ := strings.Cut(kv, "=")
		if !strings.HasPrefix(name, envPrefix+"_") || value == "" || foreignEnv(name) {
			continue
		}
		leaves := w.leaves[name]
		switch {
		case len(leaves) == 0:
			w.add(Problem{Key: name, Msg: "unknown environment variable",
				Hint: "did you mean " + nearest(name, slices.Collect(maps.Keys(w.leaves))) + "?"})
			continue
		case len(leaves) > 1:
			w.add(Problem{Key: name, Msg: "could mean " + leaves[0].key + " or " + leaves[1].key, Hint: "use the element's number"})
			continue
		}
		if err := leaves[0].check(value); err != nil {
			w.add(Problem{Key: name, Value: value, Msg: err.Error()})
			continue
		}
		set = append(set, setting{name, leaves[0].viper})
		w.env[leaves[0].key] = name
	}
	bound := map[string]string{}
	for _, a := range set {
		for _, b := range set {
			if a != b && (a.key == b.key && a.name < b.name || strings.HasPrefix(a.key, b.key+viperDelim)) {
				w.add(Problem{Key: a.name, Msg: "sets what " + b.name + " sets too"})
			}
		}
		bound[a.key] = a.name
	}
	return bound
}

// foreignEnv says whether a GATEWAY_ variable is for somebody else: see the package comment.
func foreignEnv(name string) bool {
	rest := strings.TrimPrefix(name, envPrefix+"_")
	return rest == "CONFIG" || rest == "PORT" || strings.HasPrefix(rest, "PORT_") || strings.HasPrefix(rest, "SERVICE_")
}

// decode lets viper merge the defaults, the walked tree and the environment variables in bound (viper
// key → name) into c.
func decode(root *yaml.Node, bound map[string]string, c *Config) error {
	text, err := yaml.Marshal(root)
	if err != nil {
		return err
	}
	v := viper.NewWithOptions(viper.KeyDelimiter(viperDelim))
	v.SetConfigType("yaml")
	if err := v.ReadConfig(bytes.NewReader(text)); err != nil {
		return err
	}
	v.SetDefault("shutdown_timeout", shutdownDefault)
	v.SetDefault("tier"+viperDelim+"ram", ramDefault.String())
	for name := range v.GetStringMap("pools") {
		for key, d := range map[string]any{"max_dirty_age": maxDirtyAgeDefault, "beat": beatDefault, "watch": watchDefault,
			"scrub_period": scrubPeriodDefault, "scrub_rate": scrubRateDefault} {
			v.SetDefault("pools"+viperDelim+name+viperDelim+key, d)
		}
	}
	for key, name := range bound {
		if err := v.BindEnv(key, name); err != nil {
			return err
		}
	}
	hooks := mapstructure.ComposeDecodeHookFunc(
		mapstructure.StringToTimeDurationHookFunc(),
		mapstructure.TextUnmarshallerHookFunc(),
		mapstructure.StringToWeakSliceHookFunc(","),
		indexedList,
	)
	return v.UnmarshalExact(c, viper.DecodeHook(hooks), func(d *mapstructure.DecoderConfig) { d.TagName = "yaml" })
}

// indexedList turns a map keyed by index back into the list that the walker made it from. Elements cut
// out for their problems leave empty ones, so that the others keep their numbers.
func indexedList(from, to reflect.Type, data any) (any, error) {
	m, ok := data.(map[string]any)
	if !ok || to.Kind() != reflect.Slice {
		return data, nil
	}
	var list []any
	for key, value := range m {
		i, err := strconv.Atoi(key)
		if err != nil {
			return nil, fmt.Errorf("list index %q: %w", key, err)
		}
		for len(list) <= i {
			if to.Elem().Kind() == reflect.String {
				list = append(list, "")
			} else {
				list = append(list, map[string]any{})
			}
		}
		list[i] = value
	}
	return list, nil
}
