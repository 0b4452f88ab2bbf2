#include "bundle.h"

#include <cmath>

namespace {

std::vector<Port> ports_of(const json::Value& entries) {
  std::vector<Port> ports;
  for (const auto& entry : entries.array()) {
    ports.push_back({entry["name"].text(), entry["kind"].text(), entry["target"].text(), sizes_of(entry["shape"]),
                     dtype_of(entry["dtype"].text())});
  }
  return ports;
}

// "region/value/slot" without its last part.
std::pair<std::string, std::string> split_last(const std::string& target) {
  const size_t at = target.rfind('/');
  return {target.substr(0, at), target.substr(at + 1)};
}

at::Tensor rows_of(const json::Value& table) {
  std::vector<float> values;
  int64_t width = 0;
  for (const auto& row : table.array()) {
    width = static_cast<int64_t>(row.array().size());
    for (const auto& weight : row.array()) values.push_back(static_cast<float>(weight.number()));
  }
  return at::tensor(values).reshape({static_cast<int64_t>(table.array().size()), width});
}

}  // namespace

Bundle::Bundle(const std::string& folder) {
  manifest_ = json::parse(read_file(folder + "/manifest.json"));
  if (manifest_["format"].text() != "diffcache_fx.bundle" || manifest_["version"].whole() > 1)
    throw std::runtime_error(folder + " is no bundle that this host knows");
  if (manifest_["artefact"].text() != "aot_inductor")
    throw std::runtime_error("this host runs AOTInductor packages, not " + manifest_["artefact"].text());
  weights_ = load_tensors(folder + "/weights.safetensors");
  for (const auto& [name, entry] : manifest_["programs"].object()) {
    Program program{ports_of(entry["inputs"]), ports_of(entry["outputs"]), nullptr};
    program.loader = std::make_unique<torch::inductor::AOTIModelPackageLoader>(folder + "/" + entry["file"].text());
    std::unordered_map<std::string, at::Tensor> own;
    for (const auto& wanted : program.loader->get_constant_fqns()) own[wanted] = weights_.at(wanted);
    program.loader->load_constants(own, false, true, true);  // all programs read one copy
    programs_[name] = std::move(program);
  }
  const auto& leaves = manifest_["call"]["leaves"].array();
  for (size_t i = 0; i < leaves.size(); ++i) leaves_[std::to_string(i)] = leaves[i]["name"].text();
}

void Bundle::reset() {
  history_.clear();
  memory_.clear();
  live_.clear();
  total_ = 0.0;
  step_ = run_ = reuses_ = 0;
  decisions_.clear();
}

Results Bundle::run(const std::string& name, const Tensors& arguments, const Tensors& extra) {
  Program& program = programs_.at(name);
  std::vector<at::Tensor> inputs;
  for (const Port& port : program.inputs) {
    at::Tensor value;
    if (port.kind == "user") {
      value = arguments.at(leaves_.at(port.target));
    } else if (port.kind == "live") {
      value = live_.at(port.target);
    } else if (port.kind == "history" || port.kind == "memory") {
      at::Tensor& held = (port.kind == "history" ? history_ : memory_)[port.target];
      if (!held.defined()) held = at::zeros(port.shape, port.dtype);
      value = held;
    } else {  // rows, predicate, force, moment
      auto found = extra.find(port.kind + "/" + port.target);
      value = found != extra.end() ? found->second : extra.at(port.kind);
    }
    if (value.scalar_type() != port.dtype || value.sizes() != at::IntArrayRef(port.shape))
      throw std::runtime_error(port.name + " has another dtype or shape than the program takes");
    inputs.push_back(value.contiguous());
  }
  std::vector<at::Tensor> outputs = program.loader->run(inputs);
  Results results;
  for (size_t i = 0; i < outputs.size(); ++i) results[program.outputs[i].kind][program.outputs[i].target] = outputs[i];
  return results;
}

void Bundle::store(const Tensors& fresh, const std::map<std::string, long>& slots) {
  std::map<std::string, long> counts;  // slots of each cut value
  for (const auto& region : manifest_["regions"].array()) {
    const auto& cut = region["cut"].array();
    for (size_t i = 0; i < cut.size(); ++i)
      counts[region["name"].text() + "/" + std::to_string(i)] = cut[i]["slots"].whole();
  }
  for (const auto& [target, value] : fresh) {
    const long slot = slots.at(split_last(target).first) % counts.at(target);
    history_[target + "/" + std::to_string(slot)] = value;
  }
}

const json::Value* Bundle::plan_entry() const {
  const auto& plan = manifest_["control"]["plan"].array();
  if (plan.empty()) return nullptr;
  if (step_ >= static_cast<long>(plan.size())) throw std::runtime_error("the plan has no entry for this step: reset()");
  return &plan[step_];
}

at::Tensor Bundle::step(const Tensors& arguments) {
  at::Tensor output;
  if (manifest_["form"].text() == "branch") {
    output = branching(arguments);
  } else {
    output = plan_entry() != nullptr ? planned(arguments) : split(arguments);
  }
  ++step_;
  return output;
}

at::Tensor Bundle::planned(const Tensors& arguments) {
  const json::Value& entry = *plan_entry();
  Tensors extra{{"moment", moment()}};
  if (!entry["rows"].array().empty()) extra["rows"] = rows_of(entry["rows"]);
  Results results = run(entry["program"].text(), arguments, extra);
  std::map<std::string, long> slots;
  for (const auto& [region, slot] : entry["store"].object()) slots[region] = slot.whole();
  store(results["state"], slots);
  decisions_ += entry["store"].object().size() == manifest_["regions"].array().size() ? 'F' : 'R';
  return results["user"].at("0");
}

bool Bundle::forced() const {
  const json::Value& schedule = manifest_["schedule"];
  const json::Value& total = manifest_["control"]["num_steps"];
  if (step_ == 0 || step_ < schedule["warm_up"].whole()) return true;
  return !total.null() && step_ >= total.whole() - schedule["cool_down"].whole();
}

// The rule of first-block caching: the relative change, through a polynomial if there is one, added up if asked.
bool Bundle::refresh(double change) {
  const json::Value& guard = rule()["guard"];
  const json::Value& schedule = manifest_["schedule"];
  double signal = change;
  const auto& coefficients = guard["coefficients"].array();
  if (!coefficients.empty()) {
    signal = 0.0;
    for (const auto& coefficient : coefficients) signal = signal * change + coefficient.number();
  }
  if (guard["accumulate"].truth()) signal += total_;
  bool wanted = forced() || guard["threshold"].number() == 0.0 || !(signal < guard["threshold"].number());
  if (!schedule["longest_reuse"].null()) wanted |= run_ >= schedule["longest_reuse"].whole();
  if (!schedule["most_reuses"].null()) wanted |= reuses_ >= schedule["most_reuses"].whole();
  if (guard["accumulate"].truth()) total_ = wanted ? 0.0 : signal;
  run_ = wanted ? 0 : run_ + 1;
  reuses_ += wanted ? 0 : 1;
  return wanted;
}

at::Tensor Bundle::split(const Tensors& arguments) {
  const json::Value& guard = rule()["guard"];
  if (manifest_["form"].text() != "split" || guard["kind"].text() != "relative_change" ||
      rule()["forecast"]["kind"].text() != "hold")
    throw std::runtime_error("this host decides by relative change, and holds; take the branch form for other guards");
  Results early = run("probe", arguments, {});
  live_ = early["live"];
  const bool fresh = refresh(early["signal"].at("0/change").item<double>());
  Results results = run(fresh ? "refresh" : "reuse", arguments, {{"moment", moment()}});
  std::map<std::string, long> slots;
  for (const auto& region : manifest_["regions"].array()) slots[region["name"].text()] = 0;
  store(results["state"], slots);
  if (fresh || guard["since"].text() == "step")
    for (const auto& [target, value] : early["memory"]) memory_[target] = value;
  live_.clear();
  decisions_ += fresh ? 'F' : 'R';
  return results["user"].at("0");
}

// The number of the step, and the share of the run that it completes.
at::Tensor Bundle::moment() const {
  const json::Value& total = manifest_["control"]["num_steps"];
  const double share = total.null() ? 0.0 : (step_ + 1) / total.number();
  return at::tensor({static_cast<float>(step_), static_cast<float>(share)});
}

at::Tensor Bundle::branching(const Tensors& arguments) {
  Tensors extra{{"moment", moment()}};
  const json::Value* entry = plan_entry();
  bool fresh = true;
  if (entry != nullptr) {
    if (!(*entry)["rows"].array().empty()) extra["rows"] = rows_of((*entry)["rows"]);
    for (const auto& [group, refresh] : (*entry)["predicates"].object()) {
      extra["predicate/" + group] = at::tensor(refresh.truth(), at::kBool).reshape({});
      fresh &= refresh.truth();
    }
  } else {
    extra["force"] = at::full({}, forced() ? 1.0 : 0.0, at::kFloat);
  }
  Results results = run("step", arguments, extra);
  for (const auto& [target, value] : results["state"]) history_[target] = value;
  for (const auto& [target, value] : results["memory"]) memory_[target] = value;
  for (const auto& [target, value] : results["decision"]) fresh = value.item<bool>();
  decisions_ += fresh ? 'F' : 'R';
  return results["user"].at("0");
}
